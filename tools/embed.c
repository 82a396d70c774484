/* embed OUT DIR NAME...: the kernel images DIR/NAME.cubin and DIR/NAME.fatbin as a C header.

   Text in base 85: five characters for four bytes, a little-endian word, its most significant digit first; digit d is the character
   '#' + d, but that '!' stands for '?', which C may take for a trigraph, and '~' for a backslash. Half the size of numbers, and
   compilers read strings far faster than lists of them. A string is a line of 4000 characters, since C99 promises 4095 for either;
   the bytes past an image's end are zeros. The table ends with an entry of zeros, since a C array cannot be empty. */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

static const char head[] =
    "// >>cuda_kernels: the compiled kernels, made by tools/embed from the images in ptx/\n"
    "\n"
    "/* A kernel: its cubin, and for drivers that refuse that a fatbin with its PTX. Sizes in bytes. */\n"
    "typedef struct fqla__cuda_image {\n"
    "    const char *name;\n"
    "    const char *const *cubin, *const *fatbin; /* text: tools/embed.c */\n"
    "    size_t cubin_size, fatbin_size;\n"
    "} fqla__cuda_image;\n"
    "\n";

_Noreturn static void fail(const char *path, const char *what) {
    fprintf(stderr, "embed: %s %s\n", path, what);
    exit(1);
}

enum { STRING_WORDS = 800 };

/* Write one image as an array of strings; its size in bytes. */
static size_t embed(FILE *out, const char *dir, const char *name, const char *kind) {
    char path[1024];
    FILE *in;
    unsigned char word[4] = { 0 };
    size_t size = 0, words = 0, count;
    if ((size_t)snprintf(path, sizeof path, "%s/%s.%s", dir, name, kind) >= sizeof path) fail(path, "is too long a path");
    in = fopen(path, "rb");
    if (in == NULL) fail(path, "cannot be opened; `ninja ptx` makes it");
    fprintf(out, "static const char *const fqla__%s_%s[] = {", name, kind);
    while ((count = fread(word, 1, sizeof word, in)) > 0) {
        uint32_t value = 0, divisor;
        size_t i;
        for (i = 0; i < count; i++) value |= (uint32_t)word[i] << (8 * i);
        if (words % STRING_WORDS == 0) fputs(words == 0 ? "\n\"" : "\",\n\"", out);
        for (divisor = 85 * 85 * 85 * 85; divisor > 0; divisor /= 85) {
            const int c = '#' + (int)(value / divisor % 85);
            fputc(c == '?' ? '!' : c == '\\' ? '~' : c, out);
        }
        words++;
        size += count;
    }
    if (ferror(in)) fail(path, "cannot be read");
    if (size == 0) fail(path, "is empty");
    fclose(in);
    fprintf(out, "\"\n};\n");
    return size;
}

int main(int argc, char **argv) {
    size_t (*sizes)[2];
    FILE *out;
    int i;
    if (argc < 3) {
        fputs("usage: embed OUT DIR [NAME]...\n", stderr);
        return 2;
    }
    out = fopen(argv[1], "wb");
    sizes = calloc((size_t)argc, sizeof *sizes);
    if (out == NULL || sizes == NULL) fail(argv[1], "cannot be written");
    fputs(head, out);
    for (i = 3; i < argc; i++) {
        sizes[i][0] = embed(out, argv[2], argv[i], "cubin");
        sizes[i][1] = embed(out, argv[2], argv[i], "fatbin");
    }
    fprintf(out, "\nstatic const fqla__cuda_image fqla__cuda_images[] = {\n");
    for (i = 3; i < argc; i++)
        fprintf(out, "    { \"%s\", fqla__%s_cubin, fqla__%s_fatbin, %zu, %zu },\n", argv[i], argv[i], argv[i], sizes[i][0],
                sizes[i][1]);
    fprintf(out, "    { NULL, NULL, NULL, 0, 0 },\n};\nenum { FQLA__CUDA_IMAGE_COUNT = %d };\n", argc - 3);
    if (ferror(out) || fclose(out) != 0) fail(argv[1], "cannot be written");
    free(sizes);
    return 0;
}
