/* A backend in C that sits the written exam: toy EXAM_FOLDER ANSWERS_FOLDER.
 *
 * It claims lattices of up to three axes without registers, raster order or far classes, with boundary absent, zeros or
 * (windows) circular; Identity, Shared and PerDisplacement encoders; Softmax with or without content and a bias table,
 * Ones and Mean; masks; results and weights in float64 and float32. All is summed in double. Whatever else is asked
 * stays without an answer, and manifest.json, written last, says how many answers there are.
 *
 * Build: cc -std=c99 -O1 toy.c -lm. With -DMIRRORED the value table is read at the opposite displacement, a mistake
 * that the exam must find.
 */
#include "files.h"

#define AXES 3

/* ---- What is claimed ---- */

static int plain_encoder(const Json *encoder)
{
    static const char *const known[] = {"Identity", "Shared", "PerDisplacement", NULL};
    return is_null(encoder) || one_of(kind(encoder), known);
}

static int claimed(const Json *question, const Json *operator)
{
    static const char *const relevances[] = {"Softmax", "Ones", "Mean", NULL};
    const Json *layout = get(operator, "layout"), *relevance = get(operator, "relevance");
    if (is_text(get(question, "kind"), "vjp") || !one_of(kind(relevance), relevances))
        return 0;
    if (!is_text(get(question, "dtype"), "float64") && !is_text(get(question, "dtype"), "float32"))
        return 0;
    if (strcmp(kind(layout), "Lattice") || whole(get(layout, "registers")) || !is_null(get(layout, "far")))
        return 0;
    int rank = get(layout, "grid")->count;
    if (rank > AXES || (rank > 1 && get(layout, "causal")->type == 't'))
        return 0;
    static const char *const boundaries[] = {"absent", "zeros", "circular", NULL};
    const char *boundary = get(layout, "boundary")->text;
    if (!one_of(boundary, boundaries) || (!strcmp(boundary, "circular") && is_null(get(layout, "kernel_size"))))
        return 0;
    if (!strcmp(kind(relevance), "Softmax")) {
        const Json *bias = get(relevance, "bias");
        if (!is_null(bias) && strcmp(kind(bias), "BiasTable"))
            return 0;
    }
    return plain_encoder(get(operator, "query")) && plain_encoder(get(operator, "key")) &&
           plain_encoder(get(operator, "value")) && plain_encoder(get(operator, "output"));
}

/* ---- The layout: displacements of every axis, ascending, and the key at a displacement from a query ---- */

typedef struct {
    int grid, keys, stride, key_stride, offset, count, *displacements;
} Axis;

typedef struct {
    int rank, zeros, circular, queries, keys, classes;
    Axis axes[AXES];
} Layout;

static int per_axis(const Json *value, int axis)
{
    return whole(value->type == '[' ? value->items[axis] : value);
}

static int ascending(const void *a, const void *b)
{
    return *(const int *)a - *(const int *)b;
}

static Axis read_axis(const Json *layout, int n)
{
    const Json *keys = get(layout, "key_grid"), *causal = get(layout, "causal"), *window = get(layout, "kernel_size");
    Axis axis;
    axis.grid = per_axis(get(layout, "grid"), n);
    axis.keys = is_null(keys) ? axis.grid : per_axis(keys, n);
    axis.stride = per_axis(get(layout, "stride"), n);
    axis.key_stride = per_axis(get(layout, "key_stride"), n);
    axis.offset = per_axis(get(layout, "offset"), n);
    int past = (causal->type == '[' ? causal->items[n] : causal)->type == 't', count = 0;
    int *found;
    if (is_null(window)) {
        found = claim((size_t)axis.grid * (size_t)axis.keys, sizeof(int));
        for (int a = 0; a < axis.grid; a++)
            for (int b = 0; b < axis.keys; b++)
                found[count++] = axis.stride * a + axis.offset - axis.key_stride * b;
    } else {
        int size = per_axis(window, n), step = per_axis(get(layout, "dilation"), n);
        int first = past ? step * (size - 1) : step * ((size - 1) / 2);
        if (!is_null(get(layout, "padding")))
            first = per_axis(get(layout, "padding"), n);
        found = claim((size_t)size, sizeof(int));
        for (int t = 0; t < size; t++)
            found[count++] = first - t * step;
    }
    qsort(found, (size_t)count, sizeof(int), ascending);
    axis.count = 0;
    for (int n0 = 0; n0 < count; n0++)
        if ((!past || found[n0] >= 0) && (!axis.count || found[n0] != found[axis.count - 1]))
            found[axis.count++] = found[n0];
    axis.displacements = found;
    return axis;
}

static Layout read_layout(const Json *json)
{
    const Json *boundary = get(json, "boundary");
    Layout layout = {get(json, "grid")->count, is_text(boundary, "zeros"), is_text(boundary, "circular"), 1, 1, 1, {{0}}};
    for (int n = 0; n < layout.rank; n++) {
        layout.axes[n] = read_axis(json, n);
        layout.queries *= layout.axes[n].grid;
        layout.keys *= layout.axes[n].keys;
        layout.classes *= layout.axes[n].count;
    }
    return layout;
}

/* The key that class `row` links with a query; `keys` for the zero token, -1 for no link. */
static int key_at(const Layout *layout, int query, int row)
{
    int key = 0, step = 1, outside = 0;
    for (int n = layout->rank - 1; n >= 0; n--) {
        const Axis *axis = layout->axes + n;
        int position = axis->stride * (query % axis->grid) + axis->offset - axis->displacements[row % axis->count];
        query /= axis->grid;
        row /= axis->count;
        if (layout->circular)
            position = (position % axis->keys + axis->keys) % axis->keys;
        if (position < 0 || position >= axis->keys * axis->key_stride)
            outside = 1;
        else if (position % axis->key_stride)
            return -1;
        else
            key += step * (position / axis->key_stride);
        step *= axis->keys;
    }
    return outside ? (layout->zeros ? layout->keys : -1) : key;
}

/* ---- Encoders ---- */

typedef struct {
    double *matrix, *bias;
    int per_class, groups, inputs, outputs;
} Encoder;

static Encoder read_encoder(const Json *json, const char *role, const Tensors *tensors, int inputs)
{
    char name[64];
    Encoder encoder = {NULL, NULL, !strcmp(kind(json), "PerDisplacement"), 1, inputs, inputs};
    sprintf(name, "params.%s.%s", role, encoder.per_class ? "table" : "weight");
    encoder.matrix = numbers(tensors, name);
    if (encoder.matrix) {
        encoder.groups = whole(get(json, "groups"));
        encoder.outputs = whole(get(json, "features"));
    }
    sprintf(name, "params.%s.bias", role);
    encoder.bias = numbers(tensors, name);
    return encoder;
}

/* token may be NULL, the zero token. Matrices are [groups, inputs / groups, outputs / groups]. */
static void encode(const Encoder *encoder, const double *token, int row, double *to)
{
    int narrow = encoder->inputs / encoder->groups, wide = encoder->outputs / encoder->groups;
    const double *matrix = encoder->matrix;
    if (matrix && encoder->per_class)
        matrix += (size_t)row * (size_t)encoder->inputs * (size_t)wide;
    for (int e = 0; e < encoder->outputs; e++) {
        int group = e / wide, column = e % wide;
        double sum = encoder->bias ? encoder->bias[e] : 0;
        for (int c = 0; token && matrix && c < narrow; c++)
            sum += token[group * narrow + c] * matrix[(group * narrow + c) * wide + column];
        to[e] = sum + (token && !matrix ? token[e] : 0);
    }
}

/* ---- One question ---- */

typedef struct {
    const Json *mask_shape;
    Layout layout;
    int heads, batch;
    double *x, *y, *mask, *table, scale, output_scale;
    int softmax, mean, content;
    Encoder query, key, value, output;
} Task;

/* What the mask adds to a pair: the axes of the mask are [.., H, Nq, Nk] of full size or 1. */
static double masked(const Task *task, const Json *out_shape, int b, int h, int i, int j)
{
    if (!task->mask || j == task->layout.keys)
        return 0;
    int axes = task->mask_shape->count, sizes[3] = {task->heads, task->layout.queries, task->layout.keys};
    int places[3] = {h, i, j};
    size_t at = 0, step = 1;
    for (int n = axes - 1; n >= 0; n--) {
        int fixed = n - (axes - 3), own = whole(task->mask_shape->items[n]), size, place;
        if (fixed >= 0) {
            size = sizes[fixed];
            place = places[fixed];
        } else {
            size = whole(out_shape->items[n]);
            place = b % size;
            b /= size;
        }
        at += own == size ? step * (size_t)place : 0;
        step *= (size_t)own;
    }
    return task->mask[at];
}

/* One query of one head: result [width] and weights [keys]. q, k, v have room for one encoded token each. */
static void attend(const Task *t, const Json *shape, int b, int h, int i, double *q, double *k, double *v, double *weight,
                   double *result, double *dense)
{
    const Layout *layout = &t->layout;
    int width = t->value.outputs / t->heads, narrow = t->content ? t->query.outputs / t->heads : 0;
    double greatest = -INFINITY, sum = 0;
    for (int row = 0; row < layout->classes; row++) {
        int j = key_at(layout, i, row);
        double added = j < 0 ? -INFINITY : masked(t, shape, b, h, i, j);
        weight[row] = -INFINITY;
        if (added == -INFINITY)
            continue;
        const double *token = j == layout->keys ? NULL : t->y + ((size_t)b * layout->keys + j) * t->value.inputs;
        double logit = t->softmax ? added : 0;
        if (t->content) {
            encode(&t->query, t->x + ((size_t)b * layout->queries + i) * t->query.inputs, row, q);
            encode(&t->key, token, layout->classes - 1 - row, k);
            double product = 0;
            for (int d = 0; d < narrow; d++)
                product += q[h * narrow + d] * k[h * narrow + d];
            logit += t->scale * product;
        }
        if (t->table)
            logit += t->table[h * layout->classes + row];
        weight[row] = logit;
        greatest = isnan(logit) || logit > greatest ? logit : greatest;
    }
    for (int row = 0; row < layout->classes; row++) {
        if (weight[row] == -INFINITY)
            continue;
        weight[row] = t->softmax ? exp(weight[row] - greatest) : 1;
        sum += weight[row];
    }
    for (int row = 0; row < layout->classes; row++) {
        if (weight[row] == -INFINITY)
            continue;
        int j = key_at(layout, i, row), value_row = row;
#ifdef MIRRORED
        value_row = layout->classes - 1 - row;
#endif
        const double *token = j == layout->keys ? NULL : t->y + ((size_t)b * layout->keys + j) * t->value.inputs;
        double part = t->softmax || t->mean ? weight[row] / sum : 1;
        encode(&t->value, token, value_row, v);
        for (int d = 0; d < width; d++)
            result[h * width + d] += t->output_scale * part * v[h * width + d];
        if (j < layout->keys)
            dense[j] += part;
    }
}

static void answer(const Json *question, const Json *operator, const char *from, const char *to)
{
    Tensors tensors = open_tensors(from);
    const Json *shapes = get(question, "answers"), *shape = get(shapes, "out");
    const Json *relevance = get(operator, "relevance"), *key_dim = get(operator, "key_dim");
    int dim = whole(get(operator, "dim")), keys_dim = is_null(key_dim) ? dim : whole(key_dim);
    Task t;
    memset(&t, 0, sizeof t);
    t.layout = read_layout(get(operator, "layout"));
    t.heads = whole(get(operator, "num_heads"));
    t.batch = (int)product(shape, shape->count - 2);
    t.softmax = !strcmp(kind(relevance), "Softmax");
    t.mean = !strcmp(kind(relevance), "Mean");
    t.content = t.softmax && get(relevance, "content")->type == 't';
    t.x = numbers(&tensors, "x");
    t.y = numbers(&tensors, "y");
    if (!t.y)
        t.y = numbers(&tensors, "x");
    t.mask = numbers(&tensors, "mask");
    t.mask_shape = t.mask ? get(entry(&tensors, "mask"), "shape") : NULL;
    t.table = numbers(&tensors, "params.relevance.bias");
    t.output_scale = get(operator, "output_scale")->number;
    t.value = read_encoder(get(operator, "value"), "value", &tensors, keys_dim);
    t.output = read_encoder(get(operator, "output"), "output", &tensors, t.value.outputs);
    if (t.content) {
        t.query = read_encoder(get(operator, "query"), "query", &tensors, dim);
        t.key = read_encoder(get(operator, "key"), "key", &tensors, keys_dim);
        const Json *scale = get(relevance, "scale");
        t.scale = is_null(scale) ? 1 / sqrt((double)(t.query.outputs / t.heads)) : scale->number;
    }
    int queries = t.layout.queries, keys = t.layout.keys, features = t.output.outputs, inner = t.value.outputs;
    double *out = claim((size_t)t.batch * queries * features, sizeof(double));
    double *weights = claim((size_t)t.batch * t.heads * queries * keys, sizeof(double));
    double *q = claim((size_t)t.query.outputs, sizeof(double)), *k = claim((size_t)t.key.outputs, sizeof(double));
    double *v = claim((size_t)inner, sizeof(double)), *links = claim((size_t)t.layout.classes, sizeof(double));
    double *joined = claim((size_t)inner, sizeof(double));
    for (int b = 0; b < t.batch; b++)
        for (int i = 0; i < queries; i++) {
            memset(joined, 0, (size_t)inner * sizeof(double));
            for (int h = 0; h < t.heads; h++)
                attend(&t, shape, b, h, i, q, k, v, links, joined,
                       weights + (((size_t)b * t.heads + h) * queries + i) * keys);
            encode(&t.output, joined, 0, out + ((size_t)b * queries + i) * features);
        }
    int asked = is_text(get(question, "kind"), "weights");
    write_answer(to, is_text(get(question, "dtype"), "float64") ? 8 : 4, shapes, out, asked ? weights : NULL);
    double *const used[] = {t.x, t.y, t.mask, t.table, t.value.matrix, t.value.bias, t.output.matrix, t.output.bias,
                            t.query.matrix, t.query.bias, t.key.matrix, t.key.bias, out, weights, q, k, v, links, joined};
    for (size_t n = 0; n < sizeof used / sizeof *used; n++)
        free(used[n]);
    for (int n = 0; n < t.layout.rank; n++)
        free(t.layout.axes[n].displacements);
    release(tensors.header);
    free(tensors.bytes);
}

int main(int count, char **words)
{
    char from[4096], to[4096];
    size_t size;
    if (count != 3)
        die("usage: toy EXAM_FOLDER ANSWERS_FOLDER");
    snprintf(from, sizeof from, "%s/exam.json", words[1]);
    char *text = whole_file(from, &size);
    const char *at = text;
    Json *exam = parse(&at);
    if (!is_text(get(exam, "schema"), "translution/exam") || whole(get(exam, "version")) != 1)
        die("%s is of another version", from);
    const Json *questions = get(exam, "questions"), *operators = get(exam, "operators");
    int answered = 0;
    for (int n = 0; n < questions->count; n++) {
        const Json *question = questions->items[n], *operator = operators->items[whole(get(question, "operator"))];
        if (!claimed(question, operator))
            continue;
        snprintf(from, sizeof from, "%s/%s", words[1], get(question, "file")->text);
        snprintf(to, sizeof to, "%s/%s.safetensors", words[2], get(question, "id")->text);
        answer(question, operator, from, to);
        answered++;
    }
    snprintf(to, sizeof to, "%s/manifest.json", words[2]);
    FILE *manifest = fopen(to, "w");
    if (!manifest || fprintf(manifest, "{\"name\": \"toy_c\", \"answered\": %d}\n", answered) < 0 || fclose(manifest))
        die("%s can't be written", to);
    printf("%d of %d questions answered\n", answered, questions->count);
    release(exam);
    free(text);
    return 0;
}
