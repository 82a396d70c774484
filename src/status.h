// >>status: names and sentences, and the one way to fail

FLASHQLA_API const char *fqla_status_name(fqla_status status) {
    switch (status) {
#define FLASHQLA_X(name, sentence) \
    case name: return #name;
        FLASHQLA_STATUSES(FLASHQLA_X)
#undef FLASHQLA_X
    case FQLA_STATUS_COUNT: break;
    }
    return "FQLA_UNKNOWN";
}

FLASHQLA_API const char *fqla_status_string(fqla_status status) {
    switch (status) {
#define FLASHQLA_X(name, sentence) \
    case name: return sentence;
        FLASHQLA_STATUSES(FLASHQLA_X)
#undef FLASHQLA_X
    case FQLA_STATUS_COUNT: break;
    }
    return "a status that this library does not have";
}

#if defined(__GNUC__)
#define FLASHQLA__PRINTF(at, first) __attribute__((format(printf, at, first)))
#else
#define FLASHQLA__PRINTF(at, first)
#endif

/* Send one line to the desc's logger. */
static void fqla__vlog(const fqla_context_desc *desc, fqla_log_level level, const char *format, va_list list) {
    char message[512];
    if (desc == NULL || desc->log == NULL) return;
    vsnprintf(message, sizeof message, format, list);
    desc->log(level, message, desc->log_user);
}

FLASHQLA__PRINTF(2, 3) static void fqla__info(const fqla_context_desc *desc, const char *format, ...) {
    va_list list;
    va_start(list, format);
    fqla__vlog(desc, FQLA_LOG_INFO, format, list);
    va_end(list);
}

/* Log the sentence that says which field and which value, and return status: `return fqla__fail(...)`. */
FLASHQLA__PRINTF(3, 4) static fqla_status fqla__fail(const fqla_context_desc *desc, fqla_status status, const char *format, ...) {
    va_list list;
    va_start(list, format);
    fqla__vlog(desc, FQLA_LOG_ERROR, format, list);
    va_end(list);
    return status;
}
