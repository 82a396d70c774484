// >>library: opening a dynamic library at run time, by POSIX and by Win32.
// fqla__library_symbol copies a symbol's address into *function, a function pointer: C has no cast from one to the other.

#if defined(_WIN32)
static void *fqla__library_open(const char *name) { return (void *)LoadLibraryA(name); }
static void fqla__library_close(void *library) { FreeLibrary((HMODULE)library); }
static bool fqla__library_symbol(void *library, const char *name, void *function) {
    FARPROC address = GetProcAddress((HMODULE)library, name);
    memcpy(function, &address, sizeof address);
    return address != NULL;
}
#else
static void *fqla__library_open(const char *name) { return dlopen(name, RTLD_NOW | RTLD_LOCAL); }
static void fqla__library_close(void *library) { dlclose(library); }
static bool fqla__library_symbol(void *library, const char *name, void *function) {
    void *address = dlsym(library, name);
    memcpy(function, &address, sizeof address);
    return address != NULL;
}
#endif
