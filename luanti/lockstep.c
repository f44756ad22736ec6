/* Runs a game in lockstep with a recorder. The game loads this library with LD_PRELOAD.
 *
 * 1. A virtual clock that starts at the date LOCKSTEP_DATE (Unix seconds). It advances by exactly one frame of the
 *    recording for each drawn frame, however long the machine takes. When the main thread sleeps, the clock advances
 *    by that time and the thread does not wait. Other threads sleep in real time, but LOCKSTEP_SPEED times shorter,
 *    since the game's clock runs about that many times faster than real time. The same holds for waits with a
 *    deadline: for a semaphore, a condition variable or a mutex.
 * 2. A stop at each buffer swap. The game sends one byte on the socket LOCKSTEP_FD and, if requested, the picture
 *    (width x height BGRA) and its depth. It then waits for one byte that requests what to send at the next frame:
 *    SEND_PICTURE or SEND_NOTHING. Input sent in the meantime takes effect in that frame. The game ends when the
 *    socket is closed.
 *    Depth: the depth buffer without LOCKSTEP_STRIP rows above and below, in blocks of LOCKSTEP_BLOCK x LOCKSTEP_BLOCK
 *    pixels. For each block the four pixels around its centre are sent, as floats in 0..1. The lowest row comes
 *    first, as in the picture.
 *
 * A missing or impossible value of a LOCKSTEP_ variable ends the game with a message on stderr. Without LOCKSTEP_FD
 * the library does nothing.
 *
 * Build: cc -O2 -shared -fPIC -o lockstep.so lockstep.c -ldl
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <limits.h>
#include <pthread.h>
#include <semaphore.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

#define SECOND 1000000000LL
#define MOST_PIXELS 16384 /* per side of the picture */
#define GL_BGRA 0x80E1
#define GL_UNSIGNED_BYTE 0x1401
#define GL_DEPTH_COMPONENT 0x1902
#define GL_FLOAT 0x1406
enum { SEND_NOTHING = 'b', SEND_PICTURE = 'p' };

static int recorder = -1, width, height, strip, block, show_every;
static long long frame_ns, speed;
static unsigned char *picture;
static float *depth, *centres;
static struct timespec start[2]; /* of CLOCK_REALTIME and of the monotonic clocks */
static long long elapsed;        /* virtual nanoseconds since `start` */

/* Ends the game with a message. */
__attribute__((noreturn, format(printf, 1, 2))) static void fail(const char *format, ...)
{
    va_list values;
    va_start(values, format);
    fputs("lockstep: ", stderr);
    vfprintf(stderr, format, values);
    fputc('\n', stderr);
    va_end(values);
    _exit(2);
}

/* The variable as a whole number from `least` to `most`; `otherwise` if it is not set. */
static int number(const char *name, int otherwise, int least, int most)
{
    const char *text = getenv(name);
    char *end;
    if (!text)
        return otherwise;
    errno = 0;
    long value = strtol(text, &end, 10);
    if (errno || end == text || *end || value < least || value > most)
        fail("%s=%s: expected a whole number from %d to %d", name, text, least, most);
    return (int)value;
}

static void *allocate(size_t count, size_t size)
{
    void *memory = calloc(count, size);
    if (!memory)
        fail("out of memory: %zu bytes", count * size);
    return memory;
}

/* The function of this name that is in use without this library. */
static void *next(const char *name)
{
    void *found = dlsym(RTLD_NEXT, name);
    if (!found)
        fail("%s: no such function", name);
    return found;
}

static void real_time(clockid_t clock, struct timespec *t) { syscall(SYS_clock_gettime, clock, t); }

__attribute__((constructor)) static void set_up(void)
{
    int socket = number("LOCKSTEP_FD", -1, 0, INT_MAX);
    if (socket < 0)
        return;
    start[0].tv_sec = number("LOCKSTEP_DATE", 1000000000, 0, INT_MAX);
    real_time(CLOCK_MONOTONIC, &start[1]);
    width = number("LOCKSTEP_WIDTH", 0, 1, MOST_PIXELS);
    height = number("LOCKSTEP_HEIGHT", 0, 1, MOST_PIXELS);
    if (!width || !height)
        fail("LOCKSTEP_WIDTH and LOCKSTEP_HEIGHT: expected the size of the picture");
    strip = number("LOCKSTEP_STRIP", 0, 0, (height - 1) / 2);
    block = number("LOCKSTEP_BLOCK", 4, 2, MOST_PIXELS);
    frame_ns = SECOND / number("LOCKSTEP_FPS", 16, 1, 1000);
    speed = number("LOCKSTEP_SPEED", 1, 1, 1000);
    show_every = number("LOCKSTEP_SHOW_EVERY", 1, 1, INT_MAX);
    size_t pixels = (size_t)width * (size_t)height;
    picture = allocate(pixels, 4);
    depth = allocate(pixels, sizeof *depth);
    centres = allocate(pixels, sizeof *centres);
    recorder = socket; /* last: from now on the clock is virtual */
    unsetenv("LD_PRELOAD"); /* programs that the game starts run in real time */
}

/* ---- the clock ---- */

static int is_virtual(clockid_t clock)
{
    return clock == CLOCK_REALTIME || clock == CLOCK_REALTIME_COARSE || clock == CLOCK_MONOTONIC ||
           clock == CLOCK_MONOTONIC_COARSE || clock == CLOCK_MONOTONIC_RAW || clock == CLOCK_BOOTTIME;
}

static long long ns(const struct timespec *t)
{
    if (t->tv_sec > LLONG_MAX / SECOND - 1) /* "for ever" */
        return LLONG_MAX;
    return t->tv_sec * SECOND + t->tv_nsec;
}

static struct timespec timespec_of(long long n) { return (struct timespec){n / SECOND, n % SECOND}; }

static long long virtual_now(clockid_t clock)
{
    int wall = clock == CLOCK_REALTIME || clock == CLOCK_REALTIME_COARSE;
    return ns(&start[wall ? 0 : 1]) + __atomic_load_n(&elapsed, __ATOMIC_RELAXED);
}

int clock_gettime(clockid_t clock, struct timespec *t)
{
    if (!is_virtual(clock) || recorder < 0)
        return (int)syscall(SYS_clock_gettime, clock, t);
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
    struct timespec t = timespec_of(n / speed);
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
    if (recorder < 0 || !is_virtual(clock))
        return *deadline;
    long long left = ns(deadline) - virtual_now(clock);
    if (left < 0)
        left = 0;
    if (left > 3600 * SECOND)
        left = 3600 * SECOND;
    real_time(clock, &now);
    return timespec_of(ns(&now) + left / speed);
}

/* The result of a wait with a deadline. When the main thread has waited in vain, the clock advances to the deadline:
 * nothing else would advance it, and the thread might wait again and again. */
static int after_wait(int result, int timed_out, clockid_t clock, const struct timespec *deadline)
{
    if (timed_out && recorder >= 0 && is_virtual(clock) && syscall(SYS_gettid) == getpid()) {
        long long left = ns(deadline) - virtual_now(clock);
        if (left > 0)
            __atomic_add_fetch(&elapsed, left, __ATOMIC_RELAXED);
    }
    return result;
}

int sem_clockwait(sem_t *restrict semaphore, clockid_t clock, const struct timespec *restrict deadline)
{
    static int (*real)(sem_t *, clockid_t, const struct timespec *);
    if (!real)
        real = next("sem_clockwait");
    struct timespec until = real_deadline(clock, deadline);
    int result = real(semaphore, clock, &until);
    return after_wait(result, result && errno == ETIMEDOUT, clock, deadline);
}

int sem_timedwait(sem_t *restrict semaphore, const struct timespec *restrict deadline)
{
    static int (*real)(sem_t *, const struct timespec *);
    if (!real)
        real = next("sem_timedwait");
    struct timespec until = real_deadline(CLOCK_REALTIME, deadline);
    int result = real(semaphore, &until);
    return after_wait(result, result && errno == ETIMEDOUT, CLOCK_REALTIME, deadline);
}

int pthread_cond_clockwait(pthread_cond_t *condition, pthread_mutex_t *mutex, clockid_t clock,
                           const struct timespec *deadline)
{
    static int (*real)(pthread_cond_t *, pthread_mutex_t *, clockid_t, const struct timespec *);
    if (!real)
        real = next("pthread_cond_clockwait");
    struct timespec until = real_deadline(clock, deadline);
    int result = real(condition, mutex, clock, &until);
    return after_wait(result, result == ETIMEDOUT, clock, deadline);
}

/* The clock of the condition is an attribute that cannot be read, so it is the clock that is nearest to the deadline:
 * the two are decades apart. */
int pthread_cond_timedwait(pthread_cond_t *restrict condition, pthread_mutex_t *restrict mutex,
                           const struct timespec *restrict deadline)
{
    struct timespec now[2];
    clock_gettime(CLOCK_REALTIME, &now[0]);
    clock_gettime(CLOCK_MONOTONIC, &now[1]);
    int wall = llabs(ns(deadline) - ns(&now[0])) < llabs(ns(deadline) - ns(&now[1]));
    return pthread_cond_clockwait(condition, mutex, wall ? CLOCK_REALTIME : CLOCK_MONOTONIC, deadline);
}

int pthread_mutex_clocklock(pthread_mutex_t *mutex, clockid_t clock, const struct timespec *deadline)
{
    static int (*real)(pthread_mutex_t *, clockid_t, const struct timespec *);
    if (!real)
        real = next("pthread_mutex_clocklock");
    struct timespec until = real_deadline(clock, deadline);
    int result = real(mutex, clock, &until);
    return after_wait(result, result == ETIMEDOUT, clock, deadline);
}

int pthread_mutex_timedlock(pthread_mutex_t *restrict mutex, const struct timespec *restrict deadline)
{
    static int (*real)(pthread_mutex_t *, const struct timespec *);
    if (!real)
        real = next("pthread_mutex_timedlock");
    struct timespec until = real_deadline(CLOCK_REALTIME, deadline);
    int result = real(mutex, &until);
    return after_wait(result, result == ETIMEDOUT, CLOCK_REALTIME, deadline);
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
            const float *at = depth + (ptrdiff_t)y * width + x;
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
        if (!read_pixels)
            fail("glReadPixels: no such function; the game does not draw with OpenGL");
        read_pixels(0, 0, width, height, GL_BGRA, GL_UNSIGNED_BYTE, picture);
        send_all(picture, (size_t)width * (size_t)height * 4);
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
        real = next("glXSwapBuffers");
    if (stop_at_frame())
        real(display, drawable);
}

void SDL_GL_SwapWindow(void *window) /* newer versions of the game use SDL */
{
    static void (*real)(void *);
    if (!real)
        real = next("SDL_GL_SwapWindow");
    if (stop_at_frame())
        real(window);
}
