// >>cpu_backward: the reverse recurrence on the CPU

static bool fqla__cpu_backward_workspace(const fqla_plan *plan, int64_t *bytes) {
    (void)plan;
    *bytes = 0;
    return true;
}

static void fqla__cpu_backward(const fqla_plan *plan, const fqla_backward_args *args, void *workspace) {
    (void)plan;
    (void)args;
    (void)workspace;
}
