// >>cpu_forward: the token recurrence on the CPU, for prefill and decode

/* Bytes of workspace for forwards and decodes: O(threads). */
static bool fqla__cpu_forward_workspace(const fqla_plan *plan, int64_t *bytes) {
    (void)plan;
    *bytes = 0;
    return true;
}

static void fqla__cpu_forward(const fqla__run *run) { (void)run; }
