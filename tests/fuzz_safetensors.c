/* A fuzzer (clang's libFuzzer) on safetensors files: any bytes are read or refused with a word; what is read can be
   walked in full. */
#include "../tools/safetensors.h"
#include <stdlib.h>
#include <string.h>

static volatile unsigned int keep; /* so that what is read is not optimised away */

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);
int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    static const char *const names[] = { "q", "cu_seqlens", "", "\xff" };
    char error[ERROR_SIZE] = { 0 };
    safetensors file;
    uint8_t *bytes = (uint8_t *)malloc(size > 0 ? size : 1); /* exactly the file: one byte past it is the sanitizer's */
    unsigned int sum = 0;
    size_t at;
    int i;
    if (bytes == NULL) abort();
    memcpy(bytes, data, size);
    if (!safetensors_parse(bytes, size, &file, error)) {
        if (error[0] == '\0' || file.tensors != NULL || file.count != 0) abort();
        free(bytes);
        return 0;
    }
    for (i = 0; i < file.count; i++) {
        const safetensors_tensor *t = &file.tensors[i];
        for (at = 0; at < t->size; at++) sum += ((const uint8_t *)t->data)[at];
        sum += (unsigned int)strlen(t->name) + (unsigned int)strlen(t->dtype_name) + (unsigned int)safetensors_elements(t);
        if (safetensors_find(&file, t->name) == NULL) abort();
        if (t->dtype < SAFETENSORS_I32) {
            float *values = (float *)malloc((size_t)safetensors_elements(t) * sizeof *values + 1);
            if (values == NULL) abort();
            safetensors_to_float(t, values);
            free(values);
        }
    }
    for (i = 0; i < 4; i++) {
        const char *text = safetensors_metadata(&file, names[i]);
        sum += (unsigned int)(safetensors_find(&file, names[i]) != NULL) + (text != NULL ? (unsigned int)strlen(text) : 0);
    }
    safetensors_free(&file);
    free(bytes);
    keep = sum;
    return 0;
}
