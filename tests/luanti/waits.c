/* Waits in vain for two seconds, in the main thread and in another one, in the way that the argument names. Prints for
 * each "main" or "other", 1 if the wait timed out, the seconds of real time and those of the clock that it was given.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <pthread.h>
#include <semaphore.h>
#include <stdio.h>
#include <string.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

static const char *what;
static pthread_mutex_t held = PTHREAD_MUTEX_INITIALIZER, free_one = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t condition = PTHREAD_COND_INITIALIZER, monotonic;
static sem_t semaphore;
static int signalled;

static double seconds(const struct timespec *t) { return (double)t->tv_sec + 1e-9 * (double)t->tv_nsec; }

static double now(clockid_t clock)
{
    struct timespec t;
    clock_gettime(clock, &t);
    return seconds(&t);
}

static double real_now(void)
{
    struct timespec t;
    syscall(SYS_clock_gettime, CLOCK_MONOTONIC, &t);
    return seconds(&t);
}

static int wait_until(const struct timespec *deadline, clockid_t clock)
{
    int result = 0;
    if (!strncmp(what, "cond", 4)) {
        pthread_mutex_lock(&free_one);
        if (!strcmp(what, "cond_clock"))
            result = pthread_cond_clockwait(&condition, &free_one, clock, deadline);
        else
            result = pthread_cond_timedwait(clock == CLOCK_REALTIME ? &condition : &monotonic, &free_one, deadline);
        pthread_mutex_unlock(&free_one);
    } else if (!strcmp(what, "mutex"))
        result = pthread_mutex_timedlock(&held, deadline);
    else if (!strcmp(what, "mutex_clock"))
        result = pthread_mutex_clocklock(&held, clock, deadline);
    else
        result = sem_timedwait(&semaphore, deadline) ? errno : 0;
    return result;
}

static void *measure(void *name)
{
    int on_monotonic = strstr(what, "monotonic") || strstr(what, "clock");
    clockid_t clock = on_monotonic ? CLOCK_MONOTONIC : CLOCK_REALTIME;
    struct timespec deadline;
    double began = now(clock), real = real_now();
    clock_gettime(clock, &deadline);
    deadline.tv_sec += 2;
    int result = wait_until(&deadline, clock);
    printf("%s %d %.3f %.3f\n", (char *)name, result == ETIMEDOUT, real_now() - real, now(clock) - began);
    return NULL;
}

static void *hold(void *unused)
{
    pthread_mutex_lock(&held);
    signalled = 1;
    sleep(1000);
    return unused;
}

static void *give_signal(void *unused)
{
    struct timespec t = {5, 0};
    nanosleep(&t, NULL);
    pthread_mutex_lock(&free_one);
    signalled = 1;
    pthread_cond_broadcast(&condition);
    pthread_mutex_unlock(&free_one);
    return unused;
}

int main(int count, char **words)
{
    pthread_t other;
    pthread_condattr_t attribute;
    if (count != 2)
        return 1;
    what = words[1];
    pthread_condattr_init(&attribute);
    pthread_condattr_setclock(&attribute, CLOCK_MONOTONIC);
    pthread_cond_init(&monotonic, &attribute);
    sem_init(&semaphore, 0, 0);
    if (!strcmp(what, "for_ever")) {
        struct timespec deadline = {(time_t)((~0ULL) >> 1), 999999999};
        pthread_create(&other, NULL, give_signal, NULL);
        pthread_mutex_lock(&free_one);
        while (!signalled)
            if (pthread_cond_timedwait(&condition, &free_one, &deadline))
                return 3;
        pthread_mutex_unlock(&free_one);
        puts("signalled");
        return 0;
    }
    pthread_create(&other, NULL, hold, NULL); /* so that no thread that waits owns the mutex */
    while (!*(volatile int *)&signalled)
        sched_yield();
    pthread_create(&other, NULL, measure, "other");
    pthread_join(other, NULL);
    measure("main");
    return 0;
}
