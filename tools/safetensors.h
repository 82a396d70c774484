/* safetensors: named tensors in one file. https://github.com/huggingface/safetensors says what the format is:

       8 bytes    N, little-endian
       N bytes    JSON: { "name": { "dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24] }, ...,
                          "__metadata__": { "key": "text" } }
       the rest   the tensors' elements, row-major and little-endian, without a gap or an overlap

   Files come from anywhere, so nothing of one is believed: whatever is wrong with it becomes a line in error. */
#ifndef SAFETENSORS_H
#define SAFETENSORS_H

#include "error.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* A header of a few tensors takes 2 KB; one above this is refused unread. */
#define SAFETENSORS_MAX_HEADER ((size_t)1 << 20)
#define SAFETENSORS_MAX_RANK 8

/* The dtypes that are read and written by name here, and every other one of the format. */
typedef enum safetensors_dtype {
    SAFETENSORS_F32,
    SAFETENSORS_F16,
    SAFETENSORS_BF16,
    SAFETENSORS_I32,
    SAFETENSORS_I64,
    SAFETENSORS_OTHER
} safetensors_dtype;

typedef struct safetensors_tensor {
    const char *name;
    safetensors_dtype dtype;
    const char *dtype_name; /* "F32" */
    int rank;
    int64_t shape[SAFETENSORS_MAX_RANK];
    const void *data;       /* of any alignment */
    size_t size;            /* bytes */
} safetensors_tensor;

typedef struct safetensors {
    safetensors_tensor *tensors; /* in the order of their data */
    int count;
    void *json;                  /* holds the names and the metadata */
    void *bytes;                 /* the file, where safetensors_read read it */
} safetensors;

/* Parse `size` bytes, which outlive *file. False: *file is all zero and error holds the reason. */
bool safetensors_parse(const void *bytes, size_t size, safetensors *file, char *error);
/* Read and parse a file. */
bool safetensors_read(const char *path, safetensors *file, char *error);
void safetensors_free(safetensors *file);

/* NULL where there is none of that name. */
const safetensors_tensor *safetensors_find(const safetensors *file, const char *name);
const char *safetensors_metadata(const safetensors *file, const char *key);

/* Elements of a tensor. */
int64_t safetensors_elements(const safetensors_tensor *tensor);
/* The elements of an F32, F16 or BF16 tensor as float32. */
void safetensors_to_float(const safetensors_tensor *tensor, float *values);

/* Write a file completely or not at all. metadata: pairs of key and text, ended by NULL. Of a tensor all but dtype_name counts; its
   dtype is not SAFETENSORS_OTHER. */
bool safetensors_write(const char *path, const safetensors_tensor *tensors, int count, const char *const *metadata, char *error);

#endif
