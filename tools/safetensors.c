#include "safetensors.h"

#include "half.h"

#include <cjson/cJSON.h>
#include <errno.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

static const struct {
    const char *name;
    int size; /* bytes of an element */
    safetensors_dtype dtype;
} dtypes[] = {
    { "F32", 4, SAFETENSORS_F32 },       { "F16", 2, SAFETENSORS_F16 },       { "BF16", 2, SAFETENSORS_BF16 },
    { "I32", 4, SAFETENSORS_I32 },       { "I64", 8, SAFETENSORS_I64 },       { "F64", 8, SAFETENSORS_OTHER },
    { "U64", 8, SAFETENSORS_OTHER },     { "U32", 4, SAFETENSORS_OTHER },     { "I16", 2, SAFETENSORS_OTHER },
    { "U16", 2, SAFETENSORS_OTHER },     { "I8", 1, SAFETENSORS_OTHER },      { "U8", 1, SAFETENSORS_OTHER },
    { "F8_E4M3", 1, SAFETENSORS_OTHER }, { "F8_E5M2", 1, SAFETENSORS_OTHER }, { "BOOL", 1, SAFETENSORS_OTHER },
};
enum { DTYPE_COUNT = sizeof dtypes / sizeof dtypes[0] };

// >>the header's text

/* Bytes of the UTF-8 sequence at text (RFC 3629: no overlong form, no surrogate), or 0. */
static int utf8_length(const unsigned char *text) {
    const unsigned char a = text[0], b = a >= 0xc2 ? text[1] : 0;
    int length, i;
    if (a < 0x80) return 1;
    if (a < 0xc2 || a > 0xf4) return 0;
    if ((a == 0xe0 && b < 0xa0) || (a == 0xed && b > 0x9f) || (a == 0xf0 && b < 0x90) || (a == 0xf4 && b > 0x8f)) return 0;
    length = a < 0xe0 ? 2 : a < 0xf0 ? 3 : 4;
    for (i = 1; i < length; i++) /* a zero ends the text, and is no continuation */
        if ((text[i] & 0xc0) != 0x80) return 0;
    return length;
}

/* cJSON takes anything for text and ends a string at \u0000: names would not be what the file says. */
static bool check_text(const char *text, size_t size, char *error) {
    size_t i = 0;
    while (i < size) {
        const int length = utf8_length((const unsigned char *)text + i);
        if (text[i] == '\0' || length == 0) return fail(error, "the header is not UTF-8 at byte %zu", i);
        if (text[i] == '\\') {
            if (strncmp(text + i, "\\u0000", 6) == 0) return fail(error, "the header has a zero in a string at byte %zu", i);
            i++; /* what is escaped is no escape */
        }
        i += (size_t)length;
    }
    return true;
}

static int compare_keys(const void *a, const void *b) {
    return strcmp((*(const cJSON *const *)a)->string, (*(const cJSON *const *)b)->string);
}

/* cJSON keeps both of two equal keys. */
static bool check_keys(const cJSON *object, const char *where, char *error) {
    const int count = cJSON_GetArraySize(object);
    const cJSON *item, **items = malloc(((size_t)count + 1) * sizeof *items);
    bool ok = true;
    int i = 0;
    if (items == NULL) return fail(error, "out of memory");
    cJSON_ArrayForEach(item, object) items[i++] = item;
    qsort(items, (size_t)count, sizeof *items, compare_keys);
    for (i = 1; i < count && ok; i++)
        if (strcmp(items[i - 1]->string, items[i]->string) == 0)
            ok = fail(error, "%s has \"%.64s\" twice", where, items[i]->string);
    free(items);
    return ok;
}

/* A whole number that a double holds exactly. */
static bool to_integer(const cJSON *item, int64_t *value) {
    if (!cJSON_IsNumber(item) || !(item->valuedouble >= 0) || item->valuedouble > 9007199254740992.0 ||
        item->valuedouble != floor(item->valuedouble))
        return false;
    *value = (int64_t)item->valuedouble;
    return true;
}

// >>tensors

static bool parse_tensor(const cJSON *entry, const char *data, size_t data_size, safetensors_tensor *tensor, char *error) {
    const cJSON *dtype = cJSON_GetObjectItemCaseSensitive(entry, "dtype");
    const cJSON *shape = cJSON_GetObjectItemCaseSensitive(entry, "shape");
    const cJSON *offsets = cJSON_GetObjectItemCaseSensitive(entry, "data_offsets"), *item;
    const char *name = entry->string;
    int64_t begin, end, size;
    int i;
    if (!cJSON_IsObject(entry) || cJSON_GetArraySize(entry) != 3 || !cJSON_IsString(dtype) || !cJSON_IsArray(shape) ||
        !cJSON_IsArray(offsets))
        return fail(error, "tensor \"%.64s\" is not { dtype, shape, data_offsets }", name);
    for (i = 0; i < DTYPE_COUNT && strcmp(dtypes[i].name, dtype->valuestring) != 0;) i++;
    if (i == DTYPE_COUNT) return fail(error, "tensor \"%.64s\" has the unknown dtype \"%.32s\"", name, dtype->valuestring);
    tensor->name = name;
    tensor->dtype = dtypes[i].dtype;
    tensor->dtype_name = dtypes[i].name;
    size = dtypes[i].size;
    tensor->rank = 0;
    cJSON_ArrayForEach(item, shape) {
        int64_t extent;
        if (tensor->rank == SAFETENSORS_MAX_RANK)
            return fail(error, "tensor \"%.64s\" has over %d dimensions", name, SAFETENSORS_MAX_RANK);
        if (!to_integer(item, &extent)) return fail(error, "tensor \"%.64s\" has a shape of other than whole numbers", name);
        if (extent > 0 && size > INT64_MAX / extent) return fail(error, "tensor \"%.64s\" has a shape that overflows", name);
        tensor->shape[tensor->rank++] = extent;
        size *= extent;
    }
    if (cJSON_GetArraySize(offsets) != 2 || !to_integer(offsets->child, &begin) || !to_integer(offsets->child->next, &end) ||
        begin > end)
        return fail(error, "tensor \"%.64s\" has data_offsets that are not [begin, end]", name);
    if ((uint64_t)end > data_size)
        return fail(error, "tensor \"%.64s\" ends at byte %lld of %zu bytes of data", name, (long long)end, data_size);
    if (end - begin != size)
        return fail(error, "tensor \"%.64s\" has %lld bytes; its shape and dtype make %lld", name, (long long)(end - begin),
                    (long long)size);
    tensor->data = data + begin;
    tensor->size = (size_t)size;
    return true;
}

static int compare_data(const void *a, const void *b) {
    const safetensors_tensor *x = a, *y = b;
    const char *data_x = x->data, *data_y = y->data;
    if (data_x != data_y) return data_x < data_y ? -1 : 1;
    return x->size < y->size ? -1 : x->size > y->size;
}

static bool parse_header(const cJSON *json, const char *data, size_t data_size, safetensors *file, char *error) {
    const char *next = data;
    const cJSON *entry;
    int i;
    if (!check_keys(json, "the header", error)) return false;
    file->tensors = calloc((size_t)cJSON_GetArraySize(json) + 1, sizeof *file->tensors);
    if (file->tensors == NULL) return fail(error, "out of memory");
    cJSON_ArrayForEach(entry, json) {
        if (strcmp(entry->string, "__metadata__") == 0) {
            const cJSON *text;
            if (!cJSON_IsObject(entry)) return fail(error, "__metadata__ is not an object");
            if (!check_keys(entry, "__metadata__", error)) return false;
            cJSON_ArrayForEach(text, entry)
                if (!cJSON_IsString(text)) return fail(error, "__metadata__ has \"%.64s\", which is not a string", text->string);
        } else if (parse_tensor(entry, data, data_size, &file->tensors[file->count], error)) {
            file->count++;
        } else {
            return false;
        }
    }
    qsort(file->tensors, (size_t)file->count, sizeof *file->tensors, compare_data);
    for (i = 0; i < file->count; i++) {
        const safetensors_tensor *tensor = &file->tensors[i];
        if ((const char *)tensor->data < next)
            return fail(error, "tensors \"%.64s\" and \"%.64s\" overlap", file->tensors[i - 1].name, tensor->name);
        if ((const char *)tensor->data > next)
            return fail(error, "the data has a hole of %td bytes before tensor \"%.64s\"", (const char *)tensor->data - next,
                        tensor->name);
        next = (const char *)tensor->data + tensor->size;
    }
    if (next != data + data_size) return fail(error, "%td bytes after the last tensor belong to none", data + data_size - next);
    return true;
}

bool safetensors_parse(const void *bytes, size_t size, safetensors *file, char *error) {
    const unsigned char *prefix = bytes;
    uint64_t header_size = 0;
    const char *end;
    char *text;
    bool ok;
    int i;
    memset(file, 0, sizeof *file);
    if (size < 8) return fail(error, "not a safetensors file: %zu bytes, no header", size);
    for (i = 0; i < 8; i++) header_size |= (uint64_t)prefix[i] << (8 * i);
    if (header_size > size - 8)
        return fail(error, "cut off or no safetensors file: a header of %llu bytes in a file of %zu",
                    (unsigned long long)header_size, size);
    if (header_size > SAFETENSORS_MAX_HEADER)
        return fail(error, "a header of %llu bytes; %zu at most are read", (unsigned long long)header_size,
                    SAFETENSORS_MAX_HEADER);
    text = malloc((size_t)header_size + 1);
    if (text == NULL) return fail(error, "out of memory");
    memcpy(text, prefix + 8, (size_t)header_size);
    text[header_size] = '\0';
    ok = check_text(text, (size_t)header_size, error);
    if (ok) {
        file->json = text[0] == '{' ? cJSON_ParseWithOpts(text, &end, false) : NULL;
        ok = file->json != NULL && end[strspn(end, " ")] == '\0';
        if (!ok) fail(error, "the header is not a JSON object");
    }
    free(text);
    if (ok) ok = parse_header(file->json, (const char *)bytes + 8 + header_size, size - 8 - (size_t)header_size, file, error);
    if (!ok) safetensors_free(file);
    return ok;
}

void safetensors_free(safetensors *file) {
    cJSON_Delete(file->json);
    free(file->tensors);
    free(file->bytes);
    memset(file, 0, sizeof *file);
}

const safetensors_tensor *safetensors_find(const safetensors *file, const char *name) {
    int i;
    for (i = 0; i < file->count; i++)
        if (strcmp(file->tensors[i].name, name) == 0) return &file->tensors[i];
    return NULL;
}

const char *safetensors_metadata(const safetensors *file, const char *key) {
    const cJSON *metadata = cJSON_GetObjectItemCaseSensitive(file->json, "__metadata__");
    return cJSON_GetStringValue(cJSON_GetObjectItemCaseSensitive(metadata, key));
}

int64_t safetensors_elements(const safetensors_tensor *tensor) {
    int64_t elements = 1;
    int i;
    for (i = 0; i < tensor->rank; i++) elements *= tensor->shape[i];
    return elements;
}

void safetensors_to_float(const safetensors_tensor *tensor, float *values) {
    const int64_t count = safetensors_elements(tensor);
    const unsigned char *data = tensor->data;
    int64_t i;
    uint16_t half;
    if (tensor->dtype == SAFETENSORS_F32) {
        memcpy(values, data, tensor->size);
        return;
    }
    for (i = 0; i < count; i++) {
        memcpy(&half, data + 2 * i, sizeof half);
        values[i] = tensor->dtype == SAFETENSORS_BF16 ? half_from_bf16(half) : half_from_fp16(half);
    }
}

// >>files

bool safetensors_read(const char *path, safetensors *file, char *error) {
    FILE *in = fopen(path, "rb");
    struct stat status;
    void *bytes = NULL;
    size_t size = 0;
    bool ok;
    memset(file, 0, sizeof *file);
    if (in == NULL) return fail(error, "cannot be opened: %s", strerror(errno));
    ok = fstat(fileno(in), &status) == 0 && S_ISREG(status.st_mode);
    if (!ok) {
        fail(error, "not a regular file");
    } else {
        size = (size_t)status.st_size;
        bytes = malloc(size + 1);
        ok = bytes != NULL;
        if (!ok) fail(error, "no memory for its %zu bytes", size);
        else if (fread(bytes, 1, size, in) != size) ok = fail(error, "cannot be read to its end");
    }
    fclose(in);
    if (ok) ok = safetensors_parse(bytes, size, file, error);
    if (ok) file->bytes = bytes;
    else free(bytes);
    return ok;
}

/* The header's text, padded with spaces so that the data starts at a multiple of 8; free it. */
static char *make_header(const safetensors_tensor *tensors, int count, const char *const *metadata) {
    cJSON *json = cJSON_CreateObject(), *entry, *list;
    size_t offset = 0, length;
    char *text, *padded = NULL;
    int i, d;
    entry = cJSON_AddObjectToObject(json, "__metadata__");
    for (i = 0; metadata[i] != NULL; i += 2) cJSON_AddStringToObject(entry, metadata[i], metadata[i + 1]);
    for (i = 0; i < count; i++) {
        entry = cJSON_AddObjectToObject(json, tensors[i].name);
        cJSON_AddStringToObject(entry, "dtype", dtypes[tensors[i].dtype].name);
        list = cJSON_AddArrayToObject(entry, "shape");
        for (d = 0; d < tensors[i].rank; d++) cJSON_AddItemToArray(list, cJSON_CreateNumber((double)tensors[i].shape[d]));
        list = cJSON_AddArrayToObject(entry, "data_offsets");
        cJSON_AddItemToArray(list, cJSON_CreateNumber((double)offset));
        offset += tensors[i].size;
        cJSON_AddItemToArray(list, cJSON_CreateNumber((double)offset));
    }
    text = cJSON_PrintUnformatted(json);
    cJSON_Delete(json);
    if (text != NULL) {
        length = (strlen(text) + 7) / 8 * 8;
        padded = malloc(length + 1);
        if (padded != NULL) snprintf(padded, length + 1, "%-*s", (int)length, text);
        cJSON_free(text);
    }
    return padded;
}

bool safetensors_write(const char *path, const safetensors_tensor *tensors, int count, const char *const *metadata, char *error) {
    struct stat status;
    const bool in_place = stat(path, &status) == 0 && !S_ISREG(status.st_mode); /* a device or a pipe is written to, not replaced */
    const size_t name_size = strlen(path) + 32;
    char *name = malloc(name_size), *header = make_header(tensors, count, metadata);
    unsigned char prefix[8];
    FILE *out = NULL;
    uint64_t length;
    bool ok = name != NULL && header != NULL;
    int i;
    if (!ok) {
        fail(error, "out of memory");
        goto done;
    }
    snprintf(name, name_size, in_place ? "%s" : "%s.%ld.part", path, (long)getpid());
    out = fopen(name, "wb");
    ok = out != NULL;
    if (ok) {
        length = strlen(header);
        for (i = 0; i < 8; i++) prefix[i] = (unsigned char)(length >> (8 * i));
        ok = fwrite(prefix, 1, 8, out) == 8 && fwrite(header, 1, (size_t)length, out) == length;
        for (i = 0; ok && i < count; i++) ok = fwrite(tensors[i].data, 1, tensors[i].size, out) == tensors[i].size;
        ok = fclose(out) == 0 && ok;
        if (ok && !in_place) ok = rename(name, path) == 0;
    }
    if (!ok) {
        fail(error, "cannot be written: %s", strerror(errno));
        if (out != NULL && !in_place) remove(name);
    }
done:
    free(name);
    free(header);
    return ok;
}
