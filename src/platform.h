// >>platform: mutexes, conditions and threads, of POSIX and of Win32

#if defined(_WIN32)

typedef SRWLOCK fqla__mutex;
typedef CONDITION_VARIABLE fqla__condition;
typedef HANDLE fqla__thread;

static void fqla__mutex_init(fqla__mutex *m) { InitializeSRWLock(m); }
static void fqla__mutex_destroy(fqla__mutex *m) { (void)m; }
static void fqla__mutex_lock(fqla__mutex *m) { AcquireSRWLockExclusive(m); }
static bool fqla__mutex_try_lock(fqla__mutex *m) { return TryAcquireSRWLockExclusive(m) != 0; }
static void fqla__mutex_unlock(fqla__mutex *m) { ReleaseSRWLockExclusive(m); }
static void fqla__condition_init(fqla__condition *c) { InitializeConditionVariable(c); }
static void fqla__condition_destroy(fqla__condition *c) { (void)c; }
static void fqla__condition_wait(fqla__condition *c, fqla__mutex *m) { SleepConditionVariableSRW(c, m, INFINITE, 0); }
static void fqla__condition_signal_all(fqla__condition *c) { WakeAllConditionVariable(c); }

static bool fqla__thread_start(fqla__thread *thread, LPTHREAD_START_ROUTINE function, void *argument) {
    *thread = CreateThread(NULL, 0, function, argument, 0, NULL);
    return *thread != NULL;
}
static void fqla__thread_join(fqla__thread thread) {
    WaitForSingleObject(thread, INFINITE);
    CloseHandle(thread);
}
static void fqla__thread_yield(void) { SwitchToThread(); }
#define FLASHQLA__THREAD_RETURN DWORD WINAPI

static int32_t fqla__core_count(void) {
    SYSTEM_INFO info;
    GetSystemInfo(&info);
    return (int32_t)info.dwNumberOfProcessors;
}

#else

typedef pthread_mutex_t fqla__mutex;
typedef pthread_cond_t fqla__condition;
typedef pthread_t fqla__thread;

static void fqla__mutex_init(fqla__mutex *m) { pthread_mutex_init(m, NULL); }
static void fqla__mutex_destroy(fqla__mutex *m) { pthread_mutex_destroy(m); }
static void fqla__mutex_lock(fqla__mutex *m) { pthread_mutex_lock(m); }
static bool fqla__mutex_try_lock(fqla__mutex *m) { return pthread_mutex_trylock(m) == 0; }
static void fqla__mutex_unlock(fqla__mutex *m) { pthread_mutex_unlock(m); }
static void fqla__condition_init(fqla__condition *c) { pthread_cond_init(c, NULL); }
static void fqla__condition_destroy(fqla__condition *c) { pthread_cond_destroy(c); }
static void fqla__condition_wait(fqla__condition *c, fqla__mutex *m) { pthread_cond_wait(c, m); }
static void fqla__condition_signal_all(fqla__condition *c) { pthread_cond_broadcast(c); }

static bool fqla__thread_start(fqla__thread *thread, void *(*function)(void *), void *argument) {
    return pthread_create(thread, NULL, function, argument) == 0;
}
static void fqla__thread_join(fqla__thread thread) { pthread_join(thread, NULL); }
static void fqla__thread_yield(void) { sched_yield(); }
#define FLASHQLA__THREAD_RETURN void *

static int32_t fqla__core_count(void) {
    const long count = sysconf(_SC_NPROCESSORS_ONLN);
    return count < 1 ? 1 : (int32_t)count;
}

#endif
