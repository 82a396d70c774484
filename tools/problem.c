#include "problem.h"

#include "half.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

// >>reading

/* "[2, 3]" */
static const char *shape_text(const safetensors_tensor *tensor, char text[256]) {
    size_t length = 0;
    int i;
    text[0] = '\0';
    for (i = 0; i < tensor->rank; i++)
        length += (size_t)snprintf(text + length, 256 - length, "%s%lld", i > 0 ? ", " : "", (long long)tensor->shape[i]);
    return text;
}

/* A tensor of one of the dtypes (bits 1 << dtype) and of a rank, with every extent in 31 bits. Absent and not required: NULL. */
static bool get_tensor(const problem *p, const char *name, unsigned allowed, int rank, bool required,
                       const safetensors_tensor **tensor, char *error) {
    char shape[256];
    int i;
    const safetensors_tensor *t = *tensor = safetensors_find(&p->file, name);
    if (t == NULL) return !required || fail(error, "tensor \"%s\" is missing", name);
    if ((1u << t->dtype & allowed) == 0)
        return fail(error, "tensor \"%s\" has dtype %s, which cannot stand here", name, t->dtype_name);
    if (t->rank != rank)
        return fail(error, "tensor \"%s\" has shape [%s]; %d dimensions are needed", name, shape_text(t, shape), rank);
    for (i = 0; i < rank; i++)
        if (t->shape[i] > INT32_MAX) return fail(error, "tensor \"%s\" has shape [%s], over 2^31 - 1", name, shape_text(t, shape));
    return true;
}

static bool check_shape(const safetensors_tensor *t, const safetensors_tensor *needed, char *error) {
    char is[256], should_be[256];
    if (t == NULL || memcmp(t->shape, needed->shape, (size_t)needed->rank * sizeof t->shape[0]) == 0) return true;
    return fail(error, "tensor \"%s\" has shape [%s]; the others make it [%s]", t->name, shape_text(t, is),
                shape_text(needed, should_be));
}

static void set_shape(safetensors_tensor *tensor, const char *name, int rank, int64_t a, int64_t b, int64_t c, int64_t d) {
    tensor->name = name;
    tensor->rank = rank;
    tensor->shape[0] = a;
    tensor->shape[1] = b;
    tensor->shape[2] = c;
    tensor->shape[3] = d;
}

void problem_output_shape(const problem *p, const char *name, safetensors_tensor *tensor) {
    const bool kv = p->state_layout == FQLA_STATE_KV;
    if (strcmp(name, "dq") == 0 || strcmp(name, "dk") == 0) set_shape(tensor, name, 3, p->tokens, p->heads_qk, p->dim_k, 0);
    else if (strcmp(name, "dg") == 0 || strcmp(name, "dbeta") == 0) set_shape(tensor, name, 2, p->tokens, p->heads_v, 0, 0);
    else if (strcmp(name, "ht") == 0 || strcmp(name, "dh0") == 0)
        set_shape(tensor, name, 4, p->num_seqs, p->heads_v, kv ? p->dim_k : p->dim_v, kv ? p->dim_v : p->dim_k);
    else set_shape(tensor, name, 3, p->tokens, p->heads_v, p->dim_v, 0); /* o and dv */
}

static bool read_metadata(problem *p, char *error) {
    const char *scale = safetensors_metadata(&p->file, "scale"), *layout = safetensors_metadata(&p->file, "state_layout");
    const char *map = safetensors_metadata(&p->file, "head_map"), *l2norm = safetensors_metadata(&p->file, "l2norm");
    p->scale = (float)(1.0 / sqrt((double)p->dim_k));
    if (scale != NULL) {
        char *end;
        p->scale = strtof(scale, &end);
        if (end == scale || *end != '\0' || !isfinite(p->scale) || p->scale == 0.0f)
            return fail(error, "metadata scale is \"%.32s\"; a number other than 0", scale);
    }
    if (layout != NULL) {
        if (strcmp(layout, "N,H,K,V") == 0) p->state_layout = FQLA_STATE_KV;
        else if (strcmp(layout, "N,H,V,K") == 0) p->state_layout = FQLA_STATE_VK;
        else return fail(error, "metadata state_layout is \"%.32s\"; N,H,K,V or N,H,V,K", layout);
    }
    if (map != NULL) {
        if (strcmp(map, "div") == 0) p->head_map = FQLA_HEAD_MAP_DIV;
        else if (strcmp(map, "mod") == 0) p->head_map = FQLA_HEAD_MAP_MOD;
        else return fail(error, "metadata head_map is \"%.32s\"; div or mod", map);
    }
    if (l2norm != NULL) {
        if (strcmp(l2norm, "0") != 0 && strcmp(l2norm, "1") != 0)
            return fail(error, "metadata l2norm is \"%.32s\"; 0 or 1", l2norm);
        p->l2norm = l2norm[0] == '1';
    }
    return true;
}

/* Borders as int32; the plan checks what they say. */
static bool read_seqlens(problem *p, const safetensors_tensor *t, char *error) {
    int32_t n;
    if (t != NULL && t->shape[0] < 2)
        return fail(error, "tensor \"cu_seqlens\" has %lld entries; 2 or more are needed", (long long)t->shape[0]);
    p->num_seqs = t != NULL ? (int32_t)(t->shape[0] - 1) : 1;
    p->cu_seqlens = malloc(((size_t)p->num_seqs + 1) * sizeof *p->cu_seqlens);
    if (p->cu_seqlens == NULL) return fail(error, "out of memory");
    p->cu_seqlens[0] = 0;
    p->cu_seqlens[1] = p->tokens;
    if (t == NULL) return true;
    for (n = 0; n <= p->num_seqs; n++) {
        int64_t border;
        if (t->dtype == SAFETENSORS_I64) {
            memcpy(&border, (const char *)t->data + 8 * (size_t)n, sizeof border);
        } else {
            int32_t narrow;
            memcpy(&narrow, (const char *)t->data + 4 * (size_t)n, sizeof narrow);
            border = narrow;
        }
        if (border < 0 || border > p->tokens)
            return fail(error, "cu_seqlens[%d] is %lld; 0 to %d, the rows of q", (int)n, (long long)border, (int)p->tokens);
        p->cu_seqlens[n] = (int32_t)border;
    }
    if (p->cu_seqlens[p->num_seqs] != p->tokens)
        return fail(error, "cu_seqlens ends at %d; q has %d rows", (int)p->cu_seqlens[p->num_seqs], (int)p->tokens);
    return true;
}

static bool read_tensors(problem *p, char *error) {
    const unsigned floats = 1u << SAFETENSORS_F32 | 1u << SAFETENSORS_F16 | 1u << SAFETENSORS_BF16;
    const unsigned states = 1u << SAFETENSORS_F32 | 1u << SAFETENSORS_BF16;
    const unsigned integers = 1u << SAFETENSORS_I32 | 1u << SAFETENSORS_I64;
    const safetensors_tensor *cu_seqlens;
    safetensors_tensor like_q, like_v, like_g, like_state;
    if (!get_tensor(p, "q", floats, 3, true, &p->q, error) || !get_tensor(p, "k", floats, 3, true, &p->k, error) ||
        !get_tensor(p, "v", floats, 3, true, &p->v, error) || !get_tensor(p, "g", floats, 2, true, &p->g, error) ||
        !get_tensor(p, "beta", floats, 2, true, &p->beta, error) ||
        !get_tensor(p, "do", floats, 3, false, &p->do_, error) ||
        !get_tensor(p, "h0", states, 4, false, &p->h0, error) ||
        !get_tensor(p, "dht", states, 4, false, &p->dht, error) ||
        !get_tensor(p, "cu_seqlens", integers, 1, false, &cu_seqlens, error))
        return false;
    p->tokens = (int32_t)p->q->shape[0];
    p->heads_qk = (int32_t)p->q->shape[1];
    p->dim_k = (int32_t)p->q->shape[2];
    p->heads_v = (int32_t)p->v->shape[1];
    p->dim_v = (int32_t)p->v->shape[2];
    if (p->dim_k == 0 || p->dim_v == 0) /* to a plan 0 is the default */
        return fail(error, "tensor \"%s\" has a head dimension of 0", p->dim_k == 0 ? "q" : "v");
    if (!read_metadata(p, error) || !read_seqlens(p, cu_seqlens, error)) return false;
    problem_output_shape(p, "dq", &like_q);
    problem_output_shape(p, "o", &like_v);
    problem_output_shape(p, "dg", &like_g);
    problem_output_shape(p, "ht", &like_state);
    return check_shape(p->k, &like_q, error) && check_shape(p->v, &like_v, error) &&
           check_shape(p->g, &like_g, error) && check_shape(p->beta, &like_g, error) &&
           check_shape(p->do_, &like_v, error) && check_shape(p->h0, &like_state, error) &&
           check_shape(p->dht, &like_state, error);
}

bool problem_read(const char *path, problem *p, char *error) {
    memset(p, 0, sizeof *p);
    if (!safetensors_read(path, &p->file, error)) return false;
    if (read_tensors(p, error)) return true;
    problem_free(p);
    return false;
}

void problem_free(problem *p) {
    free(p->cu_seqlens);
    safetensors_free(&p->file);
    memset(p, 0, sizeof *p);
}

// >>running

/* The context's buffers of one run, and what went wrong first. */
typedef struct run {
    library *lib;
    void *buffers[24];
    int count;
    fqla_status status;
} run;

static void *make_buffer(run *r, size_t bytes) {
    void *buffer = NULL;
    if (r->status == FQLA_OK) r->status = fqla_alloc(r->lib->context, bytes > 0 ? bytes : 1, &buffer);
    if (r->status == FQLA_OK) r->buffers[r->count++] = buffer;
    return buffer;
}

static safetensors_dtype dtype_of(fqla_dtype dtype) {
    return dtype == FQLA_DTYPE_FP32 ? SAFETENSORS_F32 : dtype == FQLA_DTYPE_FP16 ? SAFETENSORS_F16 : SAFETENSORS_BF16;
}

static size_t element_size(safetensors_dtype dtype) { return dtype == SAFETENSORS_F32 ? 4 : 2; }

/* A tensor in the context's memory, as the dtype; NULL stays NULL. */
static void *upload(run *r, const safetensors_tensor *t, safetensors_dtype dtype, const char *path) {
    const size_t elements = t != NULL ? (size_t)safetensors_elements(t) : 0, bytes = elements * element_size(dtype);
    const void *host;
    float *wide = NULL;
    uint16_t *halves = NULL;
    void *buffer;
    size_t i;
    if (t == NULL || r->status != FQLA_OK) return NULL;
    host = t->data;
    if (t->dtype != dtype) {
        wide = malloc(elements * sizeof *wide + 1);
        if (wide == NULL) goto out_of_memory;
        safetensors_to_float(t, wide);
        host = wide;
        if (dtype == SAFETENSORS_BF16) {
            halves = malloc(elements * sizeof *halves + 1);
            if (halves == NULL) goto out_of_memory;
            for (i = 0; i < elements; i++) halves[i] = half_to_bf16(wide[i]);
            host = halves;
            complain("%s: %s is %s and rounded to BF16, as CUDA needs it", path, t->name, t->dtype_name);
        }
    }
    buffer = make_buffer(r, bytes);
    if (r->status == FQLA_OK) r->status = fqla_upload(r->lib->context, buffer, host, bytes, NULL);
    free(wide);
    free(halves);
    return buffer;
out_of_memory:
    free(wide);
    r->status = FQLA_ERROR_OUT_OF_MEMORY;
    return NULL;
}

/* Room for an output in the context's memory and in the solution. */
static void *add_output(run *r, const problem *p, const char *name, safetensors_dtype dtype, solution *s) {
    safetensors_tensor *t = &s->tensors[s->count];
    problem_output_shape(p, name, t);
    t->dtype = dtype;
    t->size = (size_t)safetensors_elements(t) * element_size(dtype);
    s->count++;
    return make_buffer(r, t->size);
}

static void download(run *r, solution *s, int output, const void *buffer) {
    void *host;
    if (r->status != FQLA_OK) return;
    host = malloc(s->tensors[output].size + 1);
    if (host == NULL) {
        r->status = FQLA_ERROR_OUT_OF_MEMORY;
        return;
    }
    s->tensors[output].data = host;
    r->status = fqla_download(r->lib->context, host, buffer, s->tensors[output].size, NULL);
}

static fqla_status make_plan(const problem *p, library *lib, bool backward, fqla_dtype dtype, fqla_plan **plan) {
    fqla_plan_desc desc;
    memset(&desc, 0, sizeof desc);
    desc.heads_qk = p->heads_qk;
    desc.heads_v = p->heads_v;
    desc.dim_k = p->dim_k;
    desc.dim_v = p->dim_v;
    desc.num_seqs = p->num_seqs;
    desc.cu_seqlens = p->cu_seqlens;
    desc.dtype = dtype;
    desc.state_layout = p->state_layout;
    desc.head_map = p->head_map;
    desc.l2norm = p->l2norm;
    desc.scale = p->scale;
    desc.backward = backward;
    return fqla_plan_create(lib->context, &desc, plan);
}

static double seconds(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec + 1e-9 * (double)now.tv_nsec;
}

fqla_status problem_solve(const problem *p, library *lib, bool backward, const char *path, solution *s, char *error) {
    const bool all_fp16 = p->q->dtype == SAFETENSORS_F16 && p->k->dtype == SAFETENSORS_F16 && p->v->dtype == SAFETENSORS_F16 &&
                          (!backward || p->do_->dtype == SAFETENSORS_F16);
    const bool cpu = lib->summary.backend == FQLA_BACKEND_CPU;
    const fqla_dtype dtype = cpu ? FQLA_DTYPE_FP32 : all_fp16 ? FQLA_DTYPE_FP16 : FQLA_DTYPE_BF16;
    const safetensors_dtype narrow = dtype_of(dtype), wide = SAFETENSORS_F32;
    fqla_forward_args forward;
    fqla_backward_args reverse;
    fqla_plan *plan = NULL;
    size_t residuals_size = 0;
    double start;
    int i, inputs;
    run r;
    memset(&r, 0, sizeof r);
    memset(&forward, 0, sizeof forward);
    memset(&reverse, 0, sizeof reverse);
    memset(s, 0, sizeof *s);
    r.lib = lib;
    lib->message[0] = '\0';
    r.status = make_plan(p, lib, backward, dtype, &plan);
    forward.q = upload(&r, p->q, narrow, path);
    forward.k = upload(&r, p->k, narrow, path);
    forward.v = upload(&r, p->v, narrow, path);
    forward.g = upload(&r, p->g, wide, path);
    forward.beta = upload(&r, p->beta, wide, path);
    forward.h0 = upload(&r, p->h0, wide, path);
    if (backward) {
        reverse.q = forward.q, reverse.k = forward.k, reverse.v = forward.v;
        reverse.g = forward.g, reverse.beta = forward.beta, reverse.h0 = forward.h0;
        reverse.do_ = upload(&r, p->do_, narrow, path);
        reverse.dht = upload(&r, p->dht, wide, path);
        if (r.status == FQLA_OK) r.status = fqla_residuals_size(plan, &residuals_size);
        if (r.status == FQLA_OK && residuals_size > 0) {
            reverse.residuals = forward.residuals = make_buffer(&r, residuals_size);
            reverse.residuals_size = forward.residuals_size = residuals_size;
        }
    }
    inputs = r.count;
    forward.o = add_output(&r, p, "o", narrow, s);
    forward.ht = add_output(&r, p, "ht", wide, s);
    if (backward) {
        reverse.dq = add_output(&r, p, "dq", narrow, s);
        reverse.dk = add_output(&r, p, "dk", narrow, s);
        reverse.dv = add_output(&r, p, "dv", narrow, s);
        reverse.dg = add_output(&r, p, "dg", wide, s);
        reverse.dbeta = add_output(&r, p, "dbeta", wide, s);
        reverse.dh0 = add_output(&r, p, "dh0", wide, s);
    }
    start = seconds();
    if (r.status == FQLA_OK) r.status = fqla_forward(plan, &forward, NULL);
    if (r.status == FQLA_OK && backward) r.status = fqla_backward(plan, &reverse, NULL);
    if (r.status == FQLA_OK) r.status = fqla_synchronize(lib->context, NULL);
    s->seconds = seconds() - start;
    for (i = 0; i < s->count; i++) download(&r, s, i, r.status == FQLA_OK ? r.buffers[inputs + i] : NULL);
    for (i = 0; i < r.count; i++) fqla_free(lib->context, r.buffers[i]);
    fqla_plan_destroy(plan);
    if (r.status != FQLA_OK) {
        fail(error, "%s", lib->message[0] != '\0' ? lib->message : fqla_status_string(r.status));
        solution_free(s);
    }
    return r.status;
}

void solution_free(solution *s) {
    int i;
    for (i = 0; i < s->count; i++) free((void *)s->tensors[i].data);
    memset(s, 0, sizeof *s);
}
