/* Reading exam.json and safetensors files, and writing an answer; little-endian machines only. */
#ifndef FILES_H
#define FILES_H

#include <math.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static void die(const char *format, ...)
{
    va_list rest;
    va_start(rest, format);
    vfprintf(stderr, format, rest);
    va_end(rest);
    fputc('\n', stderr);
    exit(1);
}

static void *claim(size_t count, size_t size)
{
    void *found = calloc(count ? count : 1, size);
    if (!found)
        die("out of memory");
    return found;
}

static char *whole_file(const char *path, size_t *size)
{
    FILE *file = fopen(path, "rb");
    if (!file)
        die("%s can't be opened", path);
    fseek(file, 0, SEEK_END);
    *size = (size_t)ftell(file);
    rewind(file);
    char *text = claim(*size + 1, 1);
    if (fread(text, 1, *size, file) != *size)
        die("%s can't be read", path);
    fclose(file);
    return text;
}

/* ---- JSON: a tree of nodes; escapes in strings are kept as they are, which is enough for names. ---- */

typedef struct Json {
    char type; /* one of { [ " 0 t f n */
    char *text;
    double number;
    int count;
    char **keys;
    struct Json **items;
} Json;

static const char *blank(const char *at)
{
    return at + strspn(at, " \t\r\n");
}

static char *quoted(const char **at)
{
    const char *end = *at + 1;
    while (*end && *end != '"')
        end += *end == '\\' ? 2 : 1;
    if (!*end)
        die("a string has no end");
    size_t length = (size_t)(end - *at - 1);
    char *found = claim(length + 1, 1);
    memcpy(found, *at + 1, length);
    *at = end + 1;
    return found;
}

static Json *parse(const char **at)
{
    Json *node = claim(1, sizeof(Json));
    *at = blank(*at);
    node->type = **at;
    if (node->type == '{' || node->type == '[') {
        char close = node->type == '{' ? '}' : ']';
        int room = 0;
        for (*at = blank(*at + 1); **at != close; *at = blank(*at + (**at == ','))) {
            if (node->count == room) {
                room = room ? 2 * room : 4;
                node->keys = realloc(node->keys, (size_t)room * sizeof(char *));
                node->items = realloc(node->items, (size_t)room * sizeof(Json *));
                if (!node->keys || !node->items)
                    die("out of memory");
            }
            if (node->type == '{') {
                node->keys[node->count] = quoted(at);
                *at = blank(*at) + 1;
            }
            node->items[node->count++] = parse(at);
            *at = blank(*at);
            if (**at != ',' && **at != close)
                die("JSON: expected , or %c at %.20s", close, *at);
        }
        ++*at;
    } else if (node->type == '"') {
        node->text = quoted(at);
    } else if (strchr("tfn", node->type) && node->type) {
        *at += node->type == 'f' ? 5 : 4;
    } else {
        char *end;
        node->number = strtod(*at, &end);
        if (end == *at)
            die("JSON: expected a value at %.20s", *at);
        node->type = '0';
        *at = end;
    }
    return node;
}

static void release(Json *node)
{
    for (int n = 0; n < node->count; n++) {
        if (node->type == '{')
            free(node->keys[n]);
        release(node->items[n]);
    }
    free(node->keys);
    free(node->items);
    free(node->text);
    free(node);
}

static const Json *get(const Json *object, const char *key)
{
    for (int n = 0; n < object->count; n++)
        if (!strcmp(object->keys[n], key))
            return object->items[n];
    die("there is no %s", key);
    return NULL;
}

static int is_null(const Json *node) { return node->type == 'n'; }
static int is_text(const Json *node, const char *text) { return node->type == '"' && !strcmp(node->text, text); }
static int whole(const Json *node) { return (int)node->number; }
static const char *kind(const Json *node) { return is_null(node) ? "" : get(node, "kind")->text; }

static const char *const *one_of(const char *text, const char *const *options)
{
    for (; *options; options++)
        if (!strcmp(text, *options))
            return options;
    return NULL;
}

/* ---- safetensors: 8 bytes of header size, a JSON header, the data. Little-endian machines only. ---- */

typedef struct {
    Json *header;
    char *bytes, *data;
} Tensors;

static Tensors open_tensors(const char *path)
{
    Tensors found;
    size_t size;
    uint64_t length;
    found.bytes = whole_file(path, &size);
    memcpy(&length, found.bytes, 8);
    found.data = found.bytes + 8 + length;
    char *text = claim(length + 1, 1);
    memcpy(text, found.bytes + 8, length);
    const char *at = text;
    found.header = parse(&at);
    free(text);
    return found;
}

static const Json *entry(const Tensors *tensors, const char *name)
{
    for (int n = 0; n < tensors->header->count; n++)
        if (!strcmp(tensors->header->keys[n], name))
            return tensors->header->items[n];
    return NULL;
}

/* The numbers of a tensor as doubles, to be freed; a BOOL mask becomes 0 and -inf. NULL where there is none. */
static double *numbers(const Tensors *tensors, const char *name)
{
    const Json *found = entry(tensors, name);
    if (!found)
        return NULL;
    const char *type = get(found, "dtype")->text;
    size_t start = (size_t)get(found, "data_offsets")->items[0]->number;
    size_t end = (size_t)get(found, "data_offsets")->items[1]->number;
    size_t width = !strcmp(type, "F64") ? 8 : !strcmp(type, "F32") ? 4 : 1, count = (end - start) / width;
    double *values = claim(count, sizeof(double));
    for (size_t n = 0; n < count; n++) {
        const char *at = tensors->data + start + n * width;
        float narrow;
        if (width == 8)
            memcpy(values + n, at, 8);
        else if (width == 4)
            memcpy(&narrow, at, 4), values[n] = narrow;
        else
            values[n] = *at ? 0 : -INFINITY;
    }
    return values;
}

static size_t product(const Json *shape, int count)
{
    size_t found = 1;
    for (int n = 0; n < count; n++)
        found *= (size_t)shape->items[n]->number;
    return found;
}

static int write_shape(char *to, const char *name, const char *type, const Json *shape, size_t start, size_t end)
{
    int used = sprintf(to, "\"%s\":{\"dtype\":\"%s\",\"shape\":[", name, type);
    for (int n = 0; n < shape->count; n++)
        used += sprintf(to + used, "%s%d", n ? "," : "", whole(shape->items[n]));
    return used + sprintf(to + used, "],\"data_offsets\":[%zu,%zu]}", start, end);
}

static void put(FILE *file, const double *values, size_t count, int width)
{
    for (size_t n = 0; n < count; n++) {
        float narrow = (float)values[n];
        fwrite(width == 8 ? (const void *)(values + n) : &narrow, (size_t)width, 1, file);
    }
}

static void write_answer(const char *path, int width, const Json *shapes, const double *out, const double *weights)
{
    const Json *wide = get(shapes, "out"), *dense = weights ? get(shapes, "weights") : NULL;
    const char *type = width == 8 ? "F64" : "F32";
    size_t first = product(wide, wide->count), second = dense ? product(dense, dense->count) : 0;
    char header[1024] = "{";
    size_t end = first * (size_t)width;
    int used = 1 + write_shape(header + 1, "out", type, wide, 0, end);
    if (dense) {
        header[used++] = ',';
        used += write_shape(header + used, "weights", type, dense, end, end + second * (size_t)width);
    }
    header[used++] = '}';
    while (used % 8)
        header[used++] = ' ';
    FILE *file = fopen(path, "wb");
    if (!file)
        die("%s can't be written", path);
    uint64_t length = (uint64_t)used;
    fwrite(&length, 8, 1, file);
    fwrite(header, 1, (size_t)used, file);
    put(file, out, first, width);
    if (dense)
        put(file, weights, second, width);
    if (fclose(file))
        die("%s can't be written", path);
}

#endif
