/* Multi-head attention in C, and a target of the suite:
 *
 *     gcc -std=gnu11 -O2 -o attention attention.c protocol.c -lm
 *     mha-spec check --command ./attention
 *
 * `attend` is the attention of one row: it works in double, and results are rounded once, when they are written. The
 * second half of this file checks the arguments. The ids in the comments are clauses of SPEC.md.
 */
#include "protocol.h"

#include <float.h>
#include <inttypes.h>
#include <math.h>
#include <string.h>

#ifndef CAUSAL_SHIFT /* a mistake that the tests plant, to prove that the suite finds it */
#define CAUSAL_SHIFT 0
#endif

static const char *const CLAIMS =
    "{\"message\": \"claims\", \"protocol\": \"mha-spec-protocol/1\", "
    "\"functions\": {\"attention\": [\"mask\", \"bias\", \"causal\", \"q_offset\", \"window\", "
    "\"q_lengths\", \"kv_lengths\", \"q_segment_ids\", \"kv_segment_ids\", \"scale\", "
    "\"softcap\", \"sinks\", \"dropout_mask\", \"dropout_rate\", \"return_lse\"]}, "
    "\"dtypes\": [\"float64\", \"float32\", \"float16\", \"bfloat16\"], \"versions\": {\"gcc\": \"" __VERSION__ "\"}}";

/* The largest offset, length and window bound (MHA-POS-1). */
static const int64_t MOST = INT64_C(1) << 30;

/* A bound of a window that excludes no key. */
static const int64_t UNBOUNDED = INT64_C(1) << 32;

typedef struct {
    const Array *query, *key, *value, *mask, *bias, *sinks, *dropout_mask, *q_lengths, *kv_lengths, *q_ids, *kv_ids;
    int64_t batch, heads, kv_heads, q_len, kv_len, qk_dim, v_dim;
    int64_t *offsets;     /* the position of query 0 of each batch entry */
    int64_t left, right;  /* the window */
    double scale, softcap, dropout_factor;
    bool in_float64;      /* the type of the softmax (MHA-SOFTMAX-2) */
} Call;

/* ---- The attention ---- */

/* Give the index of (b, h, i, j) in an array of rank 4 in which each axis may have size 1. */
static int64_t at(const Array *array, int64_t b, int64_t h, int64_t i, int64_t j) {
    const int64_t index[4] = {b, h, i, j};
    int64_t place = 0;
    for (int axis = 0; axis < 4; axis++)
        place = place * array->shape[axis] + (array->shape[axis] == 1 ? 0 : index[axis]);
    return place;
}

/* Convert to the type of the softmax (MHA-BIAS-2). */
static double converted(const Call *call, double number) { return call->in_float64 ? number : (float)number; }

/* Segment ids of different types are equal where their values are (MHA-SEG-1). */
static bool same_segment(const Array *q_ids, int64_t i, const Array *kv_ids, int64_t j) {
    bool q_below_0 = q_ids->integers[i] < 0 && q_ids->dtype != U64;
    bool kv_below_0 = kv_ids->integers[j] < 0 && kv_ids->dtype != U64;
    return q_ids->integers[i] == kv_ids->integers[j] && q_below_0 == kv_below_0;
}

/* Tell whether query i may attend to key j (MHA-MASK-3). */
static bool visible(const Call *call, int64_t b, int64_t h, int64_t i, int64_t j) {
    int64_t distance = j - (call->offsets[b] + i);
    if (distance > call->right || distance < -call->left) return false;
    if (call->q_lengths && i >= call->q_lengths->integers[b]) return false;
    if (call->kv_lengths && j >= call->kv_lengths->integers[b]) return false;
    if (call->mask && !call->mask->integers[at(call->mask, b, h, i, j)]) return false;
    if (call->q_ids && !same_segment(call->q_ids, b * call->q_len + i, call->kv_ids, b * call->kv_len + j))
        return false;
    return !call->bias || converted(call, call->bias->numbers[at(call->bias, b, h, i, j)]) != -INFINITY;
}

static double logit(const Call *call, int64_t b, int64_t h, int64_t i, int64_t j) {
    int64_t kv_head = h / (call->heads / call->kv_heads); /* MHA-HEAD-1 */
    const double *query = call->query->numbers + ((b * call->heads + h) * call->q_len + i) * call->qk_dim;
    const double *key = call->key->numbers + ((b * call->kv_heads + kv_head) * call->kv_len + j) * call->qk_dim;
    double score = 0;
    for (int64_t c = 0; c < call->qk_dim; c++) score += query[c] * key[c];
    score *= call->scale;
    if (call->softcap > 0) score = call->softcap * tanh(score / call->softcap); /* before the bias: MHA-CAP-2 */
    return call->bias ? score + converted(call, call->bias->numbers[at(call->bias, b, h, i, j)]) : score;
}

/* Write the output of a row, which holds zeros, and give its lse. `keys` and `logits` have space for kv_len elements.
 * Hidden pairs are not evaluated, so that nothing that they hold reaches the result (MHA-POISON-2). */
static double attend(const Call *call, int64_t b, int64_t h, int64_t i, int64_t *keys, double *logits, double *output) {
    double sink = call->sinks ? call->sinks->numbers[h] : -INFINITY, largest = sink;
    int64_t count = 0;
    for (int64_t j = 0; j < call->kv_len; j++) {
        if (!visible(call, b, h, i, j)) continue;
        keys[count] = j;
        logits[count] = logit(call, b, h, i, j);
        largest = fmax(largest, logits[count++]);
    }
    if (count == 0) return sink; /* MHA-EMPTY-1, MHA-EMPTY-2 */
    double sum = exp(sink - largest);
    for (int64_t k = 0; k < count; k++) sum += exp(logits[k] - largest);
    int64_t kv_head = h / (call->heads / call->kv_heads);
    for (int64_t k = 0; k < count; k++) {
        double weight = exp(logits[k] - largest) / sum * call->dropout_factor;
        if (call->dropout_mask && !call->dropout_mask->integers[at(call->dropout_mask, b, h, i, keys[k])]) weight = 0;
        const double *value =
            call->value->numbers + ((b * call->kv_heads + kv_head) * call->kv_len + keys[k]) * call->v_dim;
        for (int64_t c = 0; c < call->v_dim; c++) output[c] += weight * value[c];
    }
    return largest + log(sum);
}

/* Write the output, and the lse unless it is NULL. */
static void attend_all(const Call *call, Array *output, Array *lse) {
    int64_t *keys = allocate((size_t)call->kv_len, sizeof *keys), row = 0;
    double *logits = allocate((size_t)call->kv_len, sizeof *logits);
    for (int64_t b = 0; b < call->batch; b++)
        for (int64_t h = 0; h < call->heads; h++)
            for (int64_t i = 0; i < call->q_len; i++, row++) {
                double row_lse = attend(call, b, h, i, keys, logits, output->numbers + row * call->v_dim);
                if (lse) lse->numbers[row] = row_lse;
            }
}

/* ---- The arguments ---- */

static bool is_floating(const Array *array) { return array->dtype >= F16; }
static bool is_integer(const Array *array) { return array->dtype > BOOL && array->dtype < F16; }

/* Check query, key and value, and read the sizes (MHA-SHAPE-2, MHA-SHAPE-3, MHA-HEAD-2). */
static bool read_operands(const Question *question, Call *call, Answer *answer) {
    static const char *const names[] = {"query", "key", "value"};
    const Array **operands[] = {&call->query, &call->key, &call->value};
    for (int k = 0; k < 3; k++) {
        const Array *array = *operands[k] = array_of(question, names[k]);
        if (!array) return refuse(answer, RAISED, "`%s` is missing", names[k]);
        if (array->rank != 4)
            return refuse(answer, RAISED, "`%s` must have rank 4, received rank %d", names[k], array->rank);
        if (!is_floating(array) || array->dtype != call->query->dtype)
            return refuse(answer, RAISED, "`%s` must be floating, of the dtype of `query`", names[k]);
        if (array->shape[1] < 1 || array->shape[3] < 1)
            return refuse(answer, RAISED, "axes 1 and 3 of `%s` must not be 0", names[k]);
    }
    const int64_t *query = call->query->shape, *key = call->key->shape, *value = call->value->shape;
    if (key[0] != query[0] || key[3] != query[3])
        return refuse(answer, RAISED, "`key` must have the batch and qk_dim of `query`");
    if (memcmp(value, key, 3 * sizeof *key))
        return refuse(answer, RAISED, "`value` must have the batch, heads and length of `key`");
    if (query[1] % key[1])
        return refuse(answer, RAISED, "heads=%" PRId64 " must be a multiple of kv_heads=%" PRId64, query[1], key[1]);
    call->batch = query[0], call->heads = query[1], call->q_len = query[2], call->qk_dim = query[3];
    call->kv_heads = key[1], call->kv_len = key[2], call->v_dim = value[3];
    call->in_float64 = call->query->dtype == F64;
    return true;
}

/* Read an array that broadcasts to (batch, heads, q_len, kv_len) (MHA-MASK-2). */
static bool read_pairs(const Question *question, Call *call, Answer *answer, const char *name, const Array **array) {
    const int64_t full[4] = {call->batch, call->heads, call->q_len, call->kv_len};
    if (!(*array = array_of(question, name))) return true;
    bool valid = (*array)->rank == 4 && (strcmp(name, "bias") ? (*array)->dtype == BOOL : is_floating(*array));
    for (int axis = 0; valid && axis < 4; axis++)
        valid = (*array)->shape[axis] == 1 || (*array)->shape[axis] == full[axis];
    if (valid) return true;
    return refuse(answer, RAISED, "`%s` has a wrong dtype, or not a shape (batch, heads, q_len, kv_len)", name);
}

/* Read an array of integers of shape (batch,) or (batch, length), all of them from `least` to `most` (MHA-LEN-3). */
static bool read_integers(const Question *question, const Call *call, Answer *answer, const char *name, int64_t length,
                          int64_t least, int64_t most, const Array **array) {
    if (!(*array = array_of(question, name))) return true;
    int rank = length < 0 ? 1 : 2;
    const char *shape = rank == 1 ? "(batch,)" : "(batch, length)";
    if (!is_integer(*array) || (*array)->rank != rank || (*array)->shape[0] != call->batch
        || (rank == 2 && (*array)->shape[1] != length))
        return refuse(answer, RAISED, "`%s` must be integers of shape %s", name, shape);
    for (int64_t k = 0; rank == 1 && k < (*array)->count; k++) {
        int64_t number = (*array)->integers[k];
        bool beyond_int64 = (*array)->dtype == U64 && number < 0;
        if (beyond_int64 || number < least || number > most)
            return refuse(answer, RAISED, "`%s` must lie in [%" PRId64 ", %" PRId64 "]", name, least, most);
    }
    return true;
}

static bool read_arrays(const Question *question, Call *call, Answer *answer, const Array **offsets) {
    const char *const names[] = {"mask", "bias", "dropout_mask"};
    const Array **const arrays[] = {&call->mask, &call->bias, &call->dropout_mask};
    for (int k = 0; k < 3; k++)
        if (!read_pairs(question, call, answer, names[k], arrays[k])) return false;
    call->sinks = array_of(question, "sinks");
    if (call->sinks && (!is_floating(call->sinks) || call->sinks->rank != 1 || call->sinks->shape[0] != call->heads))
        return refuse(answer, RAISED, "`sinks` must be floating, of shape (heads,)");
    if (!read_integers(question, call, answer, "q_lengths", -1, 0, call->q_len, &call->q_lengths)
        || !read_integers(question, call, answer, "kv_lengths", -1, 0, call->kv_len, &call->kv_lengths)
        || !read_integers(question, call, answer, "q_offset", -1, -MOST, MOST, offsets)
        || !read_integers(question, call, answer, "q_segment_ids", call->q_len, 0, 0, &call->q_ids)
        || !read_integers(question, call, answer, "kv_segment_ids", call->kv_len, 0, 0, &call->kv_ids))
        return false;
    if (!call->q_ids == !call->kv_ids) return true;
    return refuse(answer, RAISED, "`q_segment_ids` and `kv_segment_ids` need each other");
}

static bool read_bound(const Json *bound, int64_t *value) {
    if (bound->kind == JSON_NULL) return true;
    *value = (int64_t)fmin(fmax(number_of(bound), -1), 4e9);
    return bound->kind == JSON_NUMBER && (double)*value == bound->number && *value >= 0 && *value <= MOST;
}

/* Read the window and the causal diagonal, which is a right bound of 0 (MHA-WINDOW-2, MHA-ARG-3). */
static bool read_window(const Question *question, Call *call, Answer *answer, bool *positioned) {
    const Json *window = option_of(question, "window"), *causal = option_of(question, "causal");
    call->left = call->right = UNBOUNDED;
    if (causal && causal->kind != JSON_BOOL) return refuse(answer, RAISED, "`causal` must be a boolean");
    if (window
        && (window->kind != JSON_LIST || window->count != 2 || !read_bound(window->first, &call->left)
            || !read_bound(window->first->next, &call->right)))
        return refuse(answer, RAISED, "`window` must be a pair, each null or an integer from 0 to 2^30");
    if (causal && causal->number && call->right > CAUSAL_SHIFT) call->right = CAUSAL_SHIFT;
    *positioned = call->left < UNBOUNDED || call->right < UNBOUNDED;
    return true;
}

/* Give each batch entry its offset: an array, an integer, or the name of a reading (MHA-POS-2). */
static bool read_offsets(const Question *question, Call *call, Answer *answer, const Array *array, bool positioned) {
    const Json *option = option_of(question, "q_offset");
    bool by_name = option && option->kind == JSON_STRING;
    bool lower_right = by_name && !strcmp(option->string, "lower_right");
    double number = option && !by_name ? number_of(option) : 0;
    if (by_name && !lower_right && strcmp(option->string, "upper_left"))
        return refuse(answer, RAISED, "`q_offset` must be \"upper_left\" or \"lower_right\"");
    if (!(fabs(number) <= (double)MOST) || number != nearbyint(number))
        return refuse(answer, RAISED, "`q_offset` must be an integer from -2^30 to 2^30");
    if (positioned && !option && !array && (call->q_len != call->kv_len || call->kv_lengths))
        return refuse(answer, RAISED, "`q_offset` is required: \"upper_left\" or \"lower_right\"");
    call->offsets = allocate((size_t)call->batch, sizeof *call->offsets);
    for (int64_t b = 0; b < call->batch; b++) {
        int64_t q_length = call->q_lengths ? call->q_lengths->integers[b] : call->q_len;
        int64_t kv_length = call->kv_lengths ? call->kv_lengths->integers[b] : call->kv_len;
        call->offsets[b] = array ? array->integers[b] : lower_right ? kv_length - q_length : (int64_t)number;
    }
    return true;
}

/* Read scale, softcap and dropout_rate (MHA-ARG-2). */
static bool read_numbers(const Question *question, Call *call, Answer *answer) {
    const Json *scale = option_of(question, "scale"), *softcap = option_of(question, "softcap");
    const Json *rate = option_of(question, "dropout_rate");
    double least = call->in_float64 ? DBL_MIN : FLT_MIN, most = call->in_float64 ? DBL_MAX : FLT_MAX;
    call->scale = scale ? number_of(scale) : 1 / sqrt((double)call->qk_dim);
    call->softcap = softcap ? number_of(softcap) : 0;
    double dropout_rate = rate ? number_of(rate) : 0;
    if (!(fabs(call->scale) <= most)) return refuse(answer, RAISED, "`scale` must be finite");
    if (softcap && !(call->softcap >= least && call->softcap <= most))
        return refuse(answer, RAISED, "`softcap` must be above 0");
    if (!(dropout_rate >= 0 && dropout_rate < 1)) return refuse(answer, RAISED, "`dropout_rate` must lie in [0, 1)");
    if (dropout_rate > 0 && !call->dropout_mask) return refuse(answer, UNSUPPORTED, "dropout needs a `dropout_mask`");
    call->dropout_factor = 1 / (1 - dropout_rate);
    return true;
}

static void answer_to(const Question *question, Answer *answer) {
    Call call = {0};
    const Array *offsets = NULL;
    bool positioned = false;
    if (strcmp(question->function, "attention")) {
        refuse(answer, UNSUPPORTED, "this program has no function %.100s", question->function);
        return;
    }
    if (!read_operands(question, &call, answer) || !read_arrays(question, &call, answer, &offsets)
        || !read_window(question, &call, answer, &positioned)
        || !read_offsets(question, &call, answer, offsets, positioned) || !read_numbers(question, &call, answer))
        return;
    const int64_t shape[] = {call.batch, call.heads, call.q_len, call.v_dim};
    Array *output = new_output(answer, "output", call.query->dtype, 4, shape);
    Array *lse = NULL;
    if (asks_for(question, "lse")) lse = new_output(answer, "lse", call.in_float64 ? F64 : F32, 3, shape);
    attend_all(&call, output, lse);
}

int main(void) { return answer_questions(CLAIMS, answer_to); }
