/* Runs a game in lockstep with a recorder. The game loads this library with LD_PRELOAD.
 *
 * 1. A virtual clock that starts at the date LOCKSTEP_DATE (Unix seconds). It advances by exactly one frame of the
 *    recording for each drawn frame, however long the machine takes. When the main thread sleeps, the clock advances
 *    by that time and the thread does not wait. Other threads sleep in real time, but LOCKSTEP_SPEED times shorter,
 *    since the game's clock runs about that many times faster than real time.
 * 2. A stop at each buffer swap. The game sends one byte on the socket LOCKSTEP_FD and, if requested, the picture
 *    (width x height BGRA) and its depth. It then waits for one byte that requests what to send at the next frame:
 *    SEND_PICTURE or SEND_NOTHING. Input sent in the meantime takes effect in that frame. The game ends when the
 *    socket is closed.
 *    Depth: the depth buffer without LOCKSTEP_STRIP rows above and below, in blocks of LOCKSTEP_BLOCK x LOCKSTEP_BLOCK
 *    pixels. For each block the four pixels around its centre are sent, as floats in 0..1. The lowest row comes
 *    first, as in the picture.
 *
 * Build: cc -O2 -shared -fPIC -o lockstep.so lockstep.c -ldl
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <pthread.h>
#include <semaphore.h>
#include <stdint.h>
#include <stdlib.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

#define SECOND 1000000000LL
#define GL_BGRA 0x80E1
#define GL_UNSIGNED_BYTE 0x1401
#define GL_DEPTH_COMPONENT 0x1902
#define GL_FLOAT 0x1406
enum { SEND_NOTHING = 'b', SEND_PICTURE = 'p' };

static int recorder = -1, width, height, strip, block, show_every;
static long long frame_ns;
static double speed;
static unsigned char *picture;
static float *depth, *centres;
static struct timespec start[2]; /* of CLOCK_REALTIME and of the monotonic clocks */
static long long elapsed;        /* virtual nanoseconds since `start` */

static int number(const char *name, int otherwise)
{
    const char *text = getenv(name);
    return text ? atoi(text) : otherwise;
}

static void real_time(clockid_t clock, struct timespec *t) { syscall(SYS_clock_gettime, clock, t); }

__attribute__((constructor)) static void set_up(void)
{
    if (recorder >= 0)
        return;
    start[0].tv_sec = number("LOCKSTEP_DATE", 1000000000);
    real_time(CLOCK_MONOTONIC, &start[1]);
    width = number("LOCKSTEP_WIDTH", 0);
    height = number("LOCKSTEP_HEIGHT", 0);
    strip = number("LOCKSTEP_STRIP", 0);
    block = number("LOCKSTEP_BLOCK", 4);
    frame_ns = SECOND / number("LOCKSTEP_FPS", 16);
    speed = number("LOCKSTEP_SPEED", 1);
    show_every = number("LOCKSTEP_SHOW_EVERY", 1);
    picture = malloc((size_t)width * height * 4);
    depth = malloc((size_t)width * height * sizeof *depth);
    centres = malloc((size_t)width * height * sizeof *centres);
    recorder = number("LOCKSTEP_FD", -1);
    unsetenv("LD_PRELOAD"); /* programs that the game starts run in real time */
}

/* ---- the clock ---- */

static int is_virtual(clockid_t clock)
{
    return clock == CLOCK_REALTIME || clock == CLOCK_REALTIME_COARSE || clock == CLOCK_MONOTONIC ||
           clock == CLOCK_MONOTONIC_COARSE || clock == CLOCK_MONOTONIC_RAW || clock == CLOCK_BOOTTIME;
}

static long long ns(const struct timespec *t) { return t->tv_sec * SECOND + t->tv_nsec; }

static struct timespec timespec_of(long long n) { return (struct timespec){n / SECOND, n % SECOND}; }

static long long virtual_now(clockid_t clock)
{
    int wall = clock == CLOCK_REALTIME || clock == CLOCK_REALTIME_COARSE;
    return ns(&start[wall ? 0 : 1]) + __atomic_load_n(&elapsed, __ATOMIC_RELAXED);
}

int clock_gettime(clockid_t clock, struct timespec *t)
{
    if (!is_virtual(clock) || recorder < 0)
        return syscall(SYS_clock_gettime, clock, t);
    *t = timespec_of(virtual_now(clock));
    return 0;
}

int gettimeofday(struct timeval *restrict t, void *restrict zone)
{
    struct timespec now;
    (void)zone;
    clock_gettime(CLOCK_REALTIME, &now);
    t->tv_sec = now.tv_sec;
    t->tv_usec = now.tv_nsec / 1000;
    return 0;
}

time_t time(time_t *out)
{
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    if (out)
        *out = now.tv_sec;
    return now.tv_sec;
}

static int sleep_for(long long n)
{
    if (n < 0)
        n = 0;
    if (syscall(SYS_gettid) == getpid()) {
        __atomic_add_fetch(&elapsed, n, __ATOMIC_RELAXED);
        n = 0; /* still yields to the other threads */
    }
    struct timespec t = timespec_of((long long)(n / speed));
    syscall(SYS_nanosleep, &t, NULL);
    return 0;
}

int nanosleep(const struct timespec *wanted, struct timespec *left)
{
    if (left)
        *left = (struct timespec){0, 0};
    return sleep_for(ns(wanted));
}

int usleep(useconds_t us) { return sleep_for(us * 1000LL); }

unsigned sleep(unsigned seconds) { return (unsigned)sleep_for(seconds * SECOND); }

int clock_nanosleep(clockid_t clock, int flags, const struct timespec *wanted, struct timespec *left)
{
    (void)left;
    return sleep_for(ns(wanted) - (flags & TIMER_ABSTIME ? virtual_now(clock) : 0));
}

/* Converts a deadline on the virtual clock to real time. */
static struct timespec real_deadline(clockid_t clock, const struct timespec *deadline)
{
    struct timespec now;
    long long left = ns(deadline) - virtual_now(clock);
    if (left < 0)
        left = 0;
    if (left > 3600 * SECOND)
        left = 3600 * SECOND;
    real_time(clock, &now);
    return timespec_of(ns(&now) + (long long)(left / speed));
}

int sem_timedwait(sem_t *restrict semaphore, const struct timespec *restrict deadline)
{
    static int (*real)(sem_t *, const struct timespec *);
    if (!real)
        real = dlsym(RTLD_NEXT, "sem_timedwait");
    struct timespec until = real_deadline(CLOCK_REALTIME, deadline);
    return real(semaphore, &until);
}

int pthread_cond_clockwait(pthread_cond_t *condition, pthread_mutex_t *mutex, clockid_t clock,
                           const struct timespec *deadline)
{
    static int (*real)(pthread_cond_t *, pthread_mutex_t *, clockid_t, const struct timespec *);
    if (!real)
        real = dlsym(RTLD_NEXT, "pthread_cond_clockwait");
    struct timespec until = real_deadline(clock, deadline);
    return real(condition, mutex, clock, &until);
}

/* ---- the stop at each frame ---- */

static void send_all(const void *bytes, size_t count)
{
    while (count) {
        ssize_t sent = send(recorder, bytes, count, MSG_NOSIGNAL);
        if (sent < 0 && errno == EINTR)
            continue;
        if (sent <= 0)
            _exit(0);
        bytes = (const char *)bytes + sent;
        count -= (size_t)sent;
    }
}

typedef void ReadPixels(int, int, int, int, unsigned, unsigned, void *);

static void send_depth(ReadPixels *read_pixels)
{
    int rows = height - 2 * strip;
    float *centre = centres;
    read_pixels(0, strip, width, rows, GL_DEPTH_COMPONENT, GL_FLOAT, depth);
    for (int y = block / 2; y < rows; y += block)
        for (int x = block / 2; x < width; x += block) {
            const float *at = depth + (size_t)y * width + x;
            *centre++ = at[-width - 1];
            *centre++ = at[-width];
            *centre++ = at[-1];
            *centre++ = at[0];
        }
    send_all(centres, (size_t)(centre - centres) * sizeof *centres);
}

/* Sends the frame and waits for the recorder. Returns whether to show the frame in the window. */
static int stop_at_frame(void)
{
    static ReadPixels *read_pixels;
    static char order = SEND_NOTHING;
    static int frames;
    if (recorder < 0)
        return 1;
    send_all(&order, 1);
    if (order == SEND_PICTURE) {
        if (!read_pixels)
            read_pixels = dlsym(RTLD_DEFAULT, "glReadPixels");
        read_pixels(0, 0, width, height, GL_BGRA, GL_UNSIGNED_BYTE, picture);
        send_all(picture, (size_t)width * height * 4);
        send_depth(read_pixels);
    }
    ssize_t got;
    while ((got = recv(recorder, &order, 1, 0)) < 0 && errno == EINTR)
        ;
    if (got <= 0)
        _exit(0); /* the recorder has ended */
    __atomic_add_fetch(&elapsed, frame_ns, __ATOMIC_RELAXED);
    return ++frames % show_every == 0;
}

void glXSwapBuffers(void *display, unsigned long drawable)
{
    static void (*real)(void *, unsigned long);
    if (!real)
        real = dlsym(RTLD_NEXT, "glXSwapBuffers");
    if (stop_at_frame())
        real(display, drawable);
}

void SDL_GL_SwapWindow(void *window) /* newer versions of the game use SDL */
{
    static void (*real)(void *);
    if (!real)
        real = dlsym(RTLD_NEXT, "SDL_GL_SwapWindow");
    if (stop_at_frame())
        real(window);
}
