/* embed OUT DIR NAME...: the kernel images DIR/NAME.cubin and DIR/NAME.fatbin as a C header.

   An image is a string: a compiler takes it as one token, where an array of numbers would be a million, and half of the time that the
   whole header takes. It lies in a union beside a 64-bit member, so that it is aligned as the driver wants it. A C array cannot be empty,
   so the table ends with an entry of zeros, which FQLA__CUDA_IMAGE_COUNT does not count. */
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>

static const char head[] =
    "// >>cuda_kernels: the compiled kernels, made by tools/embed from the images in ptx/\n"
    "\n"
    "/* A kernel: its cubin, and for drivers that refuse that a fatbin with its PTX. Sizes in bytes. */\n"
    "typedef struct fqla__cuda_image {\n"
    "    const char *name;\n"
    "    const void *cubin, *fatbin;\n"
    "    size_t cubin_size, fatbin_size;\n"
    "} fqla__cuda_image;\n"
    "\n"
    "#if defined(__GNUC__)\n"
    "#pragma GCC diagnostic push\n"
    "#pragma GCC diagnostic ignored \"-Woverlength-strings\" /* the images' are longer than any compiler has to take; all do */\n"
    "#endif\n";

static const char foot[] =
    "#if defined(__GNUC__)\n"
    "#pragma GCC diagnostic pop\n"
    "#endif\n";

_Noreturn static void fail(const char *path, const char *what) {
    fprintf(stderr, "embed: %s %s\n", path, what);
    exit(1);
}

/* One byte of a string; the columns it took. next: the byte after it, an octal digit would be taken for a part of it. ?? starts a
   trigraph. */
static int write_byte(FILE *out, int byte, int next) {
    if (byte == '"' || byte == '\\' || byte == '?') return fprintf(out, "\\%c", byte);
    if (byte >= ' ' && byte <= '~') return fprintf(out, "%c", byte);
    return fprintf(out, next >= '0' && next <= '7' ? "\\%03o" : "\\%o", (unsigned)byte);
}

/* Write one image; its size in bytes. */
static size_t embed(FILE *out, const char *dir, const char *name, const char *kind) {
    enum { COLUMNS = 126 };
    char path[1024];
    FILE *in;
    size_t size = 0;
    int byte, next, column = 0;
    bool open = false;
    if ((size_t)snprintf(path, sizeof path, "%s/%s.%s", dir, name, kind) >= sizeof path) fail(path, "is too long a path");
    in = fopen(path, "rb");
    if (in == NULL) fail(path, "cannot be opened; `ninja ptx` makes it");
    fseek(in, 0, SEEK_END);
    fprintf(out, "static const union { char bytes[%ld]; uint64_t aligned; } fqla__%s_%s = {", ftell(in) + 1, name, kind);
    rewind(in);
    for (byte = fgetc(in); byte != EOF; byte = next) {
        next = fgetc(in);
        if (!open) fputs("\n\"", out);
        column = (open ? column : 0) + write_byte(out, byte, next);
        open = column < COLUMNS;
        if (!open) fputs("\"", out);
        size++;
    }
    if (ferror(in)) fail(path, "cannot be read");
    if (size == 0) fail(path, "is empty");
    fclose(in);
    fputs(open ? "\"\n};\n" : "\n};\n", out);
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
    fputs(foot, out);
    fprintf(out, "\nstatic const fqla__cuda_image fqla__cuda_images[] = {\n");
    for (i = 3; i < argc; i++)
        fprintf(out, "    { \"%s\", &fqla__%s_cubin, &fqla__%s_fatbin, %zu, %zu },\n", argv[i], argv[i], argv[i], sizes[i][0],
                sizes[i][1]);
    fprintf(out, "    { NULL, NULL, NULL, 0, 0 },\n};\nenum { FQLA__CUDA_IMAGE_COUNT = %d };\n", argc - 3);
    if (ferror(out) || fclose(out) != 0) fail(argv[1], "cannot be written");
    free(sizes);
    return 0;
}
