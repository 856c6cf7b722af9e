/* The messages and files of docs/protocol.md. The code assumes a little-endian machine. */
#include "protocol.h"

#include <inttypes.h>
#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

/* ---- Memory: a list of blocks, all of which are freed after an answer ---- */

typedef struct Block {
    struct Block *next;
    _Alignas(max_align_t) unsigned char bytes[];
} Block;

static Block *blocks;

void *allocate(size_t count, size_t size) {
    Block *block = size && count > (SIZE_MAX / 2) / size ? NULL : calloc(1, sizeof(Block) + count * size);
    if (!block) {
        fprintf(stderr, "out of memory\n");
        exit(1);
    }
    block->next = blocks;
    blocks = block;
    return block->bytes;
}

static void release_all(void) {
    while (blocks) {
        Block *next = blocks->next;
        free(blocks);
        blocks = next;
    }
}

/* ---- JSON: a reader by recursive descent; every function gives NULL or false where the text is not JSON ---- */

enum { MOST_DEPTH = 32 };

typedef struct {
    const char *at, *end;
    int depth;
} Text;

static Json *read_value(Text *text);

static void skip_space(Text *text) {
    while (text->at < text->end && strchr(" \t\r\n", *text->at) && *text->at) text->at++;
}

static bool skip(Text *text, char symbol) {
    skip_space(text);
    if (text->at == text->end || *text->at != symbol) return false;
    text->at++;
    return true;
}

static bool skip_word(Text *text, const char *word) {
    size_t length = strlen(word);
    if ((size_t)(text->end - text->at) < length || memcmp(text->at, word, length)) return false;
    text->at += length;
    return true;
}

static bool read_hex(Text *text, uint32_t *code) {
    *code = 0;
    for (int digit = 0; digit < 4; digit++, text->at++) {
        const char *digits = "0123456789abcdef0123456789ABCDEF", *place;
        if (text->at == text->end || !*text->at || !(place = strchr(digits, *text->at))) return false;
        *code = 16 * *code + (uint32_t)(place - digits) % 16;
    }
    return true;
}

/* The lead byte of a sequence in UTF-8, and the largest code, by the number of bytes that follow. */
static const struct { uint32_t most; unsigned char lead; } UTF8[] = {
    {0x7F, 0}, {0x7FF, 0xC0}, {0xFFFF, 0xE0}, {0x10FFFF, 0xF0},
};

static char *write_utf8(char *to, uint32_t code) {
    int following = 0;
    while (code > UTF8[following].most) following++;
    *to++ = (char)(UTF8[following].lead | code >> 6 * following);
    while (following--) *to++ = (char)(0x80 | (code >> 6 * following & 0x3F));
    return to;
}

/* Read the digits after "\\u"; a code above 0xFFFF is written as a high and a low surrogate. */
static bool read_code(Text *text, uint32_t *code) {
    uint32_t high, low;
    if (!read_hex(text, &high)) return false;
    *code = high;
    if (high < 0xD800 || high > 0xDFFF) return true;
    if (high > 0xDBFF || !skip_word(text, "\\u") || !read_hex(text, &low) || low < 0xDC00 || low > 0xDFFF) return false;
    *code = 0x10000 + ((high - 0xD800) << 10) + (low - 0xDC00);
    return true;
}

static bool read_escape(Text *text, char **to) {
    const char *escapes = "\"\\/bfnrt", *meanings = "\"\\/\b\f\n\r\t", *place;
    uint32_t code;
    if (text->at == text->end) return false;
    char symbol = *text->at++;
    if (symbol == 'u') {
        if (!read_code(text, &code)) return false;
        *to = write_utf8(*to, code);
        return true;
    }
    if (!symbol || !(place = strchr(escapes, symbol))) return false;
    *(*to)++ = meanings[place - escapes];
    return true;
}

/* No string becomes longer by reading its escapes. */
static const char *read_string(Text *text) {
    if (!skip(text, '"')) return NULL;
    const char *closing = text->at;
    while (closing < text->end && *closing != '"') closing += *closing == '\\' ? 2 : 1;
    if (closing >= text->end) return NULL;
    char *string = allocate((size_t)(closing - text->at) + 1, 1), *to = string;
    while (*text->at != '"') {
        if (*text->at != '\\') *to++ = *text->at++;
        else if (text->at++, !read_escape(text, &to)) return NULL;
    }
    text->at++;
    return string;
}

static bool read_members(Text *text, Json *value, char closing) {
    Json **last = &value->first;
    if (skip(text, closing)) return true;
    do {
        const char *key = NULL;
        if (closing == '}' && (!(key = read_string(text)) || !skip(text, ':'))) return false;
        if (!(*last = read_value(text))) return false;
        (*last)->key = key;
        last = &(*last)->next;
        value->count++;
    } while (skip(text, ','));
    return skip(text, closing);
}

static bool read_number(Text *text, Json *value) {
    char digits[64];
    size_t length = 0;
    while (text->at < text->end && *text->at && strchr("+-.0123456789eE", *text->at)) {
        if (length == sizeof digits - 1) return false;
        digits[length++] = *text->at++;
    }
    digits[length] = 0;
    char *end;
    value->number = strtod(digits, &end);
    return length && !*end;
}

static bool read_into(Text *text, Json *value) {
    skip_space(text);
    if (text->at == text->end) return false;
    switch (*text->at) {
    case '{': return value->kind = JSON_OBJECT, text->at++, read_members(text, value, '}');
    case '[': return value->kind = JSON_LIST, text->at++, read_members(text, value, ']');
    case '"': return value->kind = JSON_STRING, (value->string = read_string(text)) != NULL;
    case 't': return value->kind = JSON_BOOL, value->number = 1, skip_word(text, "true");
    case 'f': return value->kind = JSON_BOOL, skip_word(text, "false");
    case 'n': return skip_word(text, "null");
    default: return value->kind = JSON_NUMBER, read_number(text, value);
    }
}

static Json *read_value(Text *text) {
    if (text->depth == MOST_DEPTH) return NULL;
    text->depth++;
    Json *value = allocate(1, sizeof *value);
    bool valid = read_into(text, value);
    text->depth--;
    return valid ? value : NULL;
}

static const Json *read_json(const char *text, size_t length) {
    Text whole = {text, text + length, 0};
    Json *value = read_value(&whole);
    skip_space(&whole);
    return value && whole.at == whole.end ? value : NULL;
}

static const Json *member(const Json *object, const char *key, JsonKind kind) {
    if (!object || object->kind != JSON_OBJECT) return NULL;
    for (const Json *value = object->first; value; value = value->next)
        if (!strcmp(value->key, key)) return value->kind == kind ? value : NULL;
    return NULL;
}

static const char *text_of(const Json *object, const char *key) {
    const Json *value = member(object, key, JSON_STRING);
    return value ? value->string : NULL;
}

/* Read an integer that is not negative, and that a double holds exactly. */
static bool read_count(const Json *value, int64_t *count) {
    if (!value || value->kind != JSON_NUMBER || !(value->number >= 0 && value->number <= 0x1p53)) return false;
    *count = (int64_t)value->number;
    return (double)*count == value->number;
}

/* ---- Elements ---- */

static const struct { const char *name; size_t size; int exponent_bits; } DTYPES[] = {
    [BOOL] = {"BOOL", 1, 0}, [U8] = {"U8", 1, 0},   [I8] = {"I8", 1, 0},   [U16] = {"U16", 2, 0}, [I16] = {"I16", 2, 0},
    [U32] = {"U32", 4, 0},   [I32] = {"I32", 4, 0}, [U64] = {"U64", 8, 0}, [I64] = {"I64", 8, 0}, [F16] = {"F16", 2, 5},
    [BF16] = {"BF16", 2, 8}, [F32] = {"F32", 4, 8}, [F64] = {"F64", 8, 11},
};

/* Read a float16 or bfloat16: a sign, an exponent, and the other bits. */
static double read_half(uint16_t bits, int exponent_bits) {
    int fraction_bits = 15 - exponent_bits, bias = (1 << (exponent_bits - 1)) - 1;
    int exponent = (bits & 0x7FFF) >> fraction_bits, fraction = bits & ((1 << fraction_bits) - 1);
    double size = exponent == 2 * bias + 1 ? (fraction ? NAN : INFINITY)
                  : exponent               ? ldexp((1 << fraction_bits) + fraction, exponent - bias - fraction_bits)
                                           : ldexp(fraction, 1 - bias - fraction_bits);
    return bits & 0x8000 ? -size : size;
}

/* Round a number to float16 or bfloat16, ties to even. */
static uint16_t round_to_half(double number, int exponent_bits) {
    int fraction_bits = 15 - exponent_bits, bias = (1 << (exponent_bits - 1)) - 1, exponent;
    uint16_t sign = signbit(number) ? 0x8000 : 0, infinity = (uint16_t)((2 * bias + 1) << fraction_bits);
    if (isnan(number)) return (uint16_t)(infinity | 1 << (fraction_bits - 1)); /* a quiet NaN */
    if (isinf(number)) return sign | infinity;
    frexp(number, &exponent);
    exponent = number == 0 || exponent - 1 < 1 - bias ? 1 - bias : exponent - 1;
    /* A fraction that is rounded up to a power of two carries into the exponent, as it must. */
    double fraction = nearbyint(ldexp(fabs(number), fraction_bits - exponent));
    double bits = fraction + ldexp(exponent + bias - 1, fraction_bits);
    return sign | (bits >= infinity ? infinity : (uint16_t)bits);
}

static void read_element(Array *array, int64_t index, const unsigned char *from) {
    uint64_t bits = 0;
    int size = (int)DTYPES[array->dtype].size;
    memcpy(&bits, from, (size_t)size);
    if (array->dtype == F64) memcpy(&array->numbers[index], &bits, 8);
    else if (array->dtype == F32) {
        float number;
        memcpy(&number, &bits, 4);
        array->numbers[index] = number;
    } else if (array->numbers) array->numbers[index] = read_half((uint16_t)bits, DTYPES[array->dtype].exponent_bits);
    else {
        bool is_signed = array->dtype == I8 || array->dtype == I16 || array->dtype == I32;
        uint64_t sign = UINT64_C(1) << (8 * size - 1);
        array->integers[index] = (int64_t)(is_signed ? (bits ^ sign) - sign : bits);
    }
}

static void write_element(const Array *array, int64_t index, unsigned char *to) {
    double number = array->numbers[index];
    float single = (float)number;
    uint16_t half;
    if (array->dtype == F64) memcpy(to, &number, 8);
    else if (array->dtype == F32) memcpy(to, &single, 4);
    else half = round_to_half(number, DTYPES[array->dtype].exponent_bits), memcpy(to, &half, 2);
}

/* ---- Safetensors ---- */

static bool read_array(const Json *entry, const unsigned char *bytes, size_t size, Array *array) {
    const char *name = text_of(entry, "dtype");
    const Json *shape = member(entry, "shape", JSON_LIST), *place = member(entry, "data_offsets", JSON_LIST);
    int64_t begin, end;
    if (!name || !shape || shape->count > MOST_AXES || !place || place->count != 2) return false;
    if (!read_count(place->first, &begin) || !read_count(place->first->next, &end)) return false;
    if (begin > end || (uint64_t)end > size) return false;
    for (array->dtype = BOOL; strcmp(name, DTYPES[array->dtype].name);)
        if (array->dtype++ == F64) return false;
    array->name = entry->key;
    array->count = 1;
    for (const Json *axis = shape->first; axis; axis = axis->next) {
        int64_t *length = &array->shape[array->rank++];
        if (!read_count(axis, length) || __builtin_mul_overflow(array->count, *length, &array->count)) return false;
    }
    int64_t element = (int64_t)DTYPES[array->dtype].size;
    if (array->count != (end - begin) / element || (end - begin) % element) return false;
    if (array->dtype >= F16) array->numbers = allocate((size_t)array->count, sizeof(double));
    else array->integers = allocate((size_t)array->count, sizeof(int64_t));
    for (int64_t i = 0; i < array->count; i++) read_element(array, i, bytes + begin + i * element);
    return true;
}

static bool read_arrays(const unsigned char *bytes, size_t size, Question *question) {
    uint64_t length;
    if (size < 8) return false;
    memcpy(&length, bytes, 8);
    if (length > size - 8) return false;
    const Json *header = read_json((const char *)bytes + 8, (size_t)length);
    if (!header || header->kind != JSON_OBJECT) return false;
    Array *arrays = allocate((size_t)header->count, sizeof(Array));
    question->arrays = arrays;
    for (const Json *entry = header->first; entry; entry = entry->next) {
        if (!strcmp(entry->key, "__metadata__")) continue;
        Array *array = &arrays[question->array_count++];
        if (!read_array(entry, bytes + 8 + length, size - 8 - (size_t)length, array)) return false;
    }
    return true;
}

static unsigned char *read_file(const char *path, size_t *size) {
    FILE *file = fopen(path, "rb");
    long end = -1;
    unsigned char *bytes = NULL;
    if (file && !fseek(file, 0, SEEK_END) && (end = ftell(file)) >= 0 && !fseek(file, 0, SEEK_SET)) {
        bytes = allocate((size_t)end, 1);
        *size = fread(bytes, 1, (size_t)end, file);
    }
    if (file) fclose(file);
    return bytes;
}

static void append(char *header, size_t *length, const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    *length += (size_t)vsnprintf(header + *length, 256, format, arguments);
    va_end(arguments);
}

/* The members of a header have at most 256 bytes for each array, and for each axis. */
static bool write_file(const char *path, const Answer *answer) {
    char *header = allocate((size_t)answer->output_count * (MOST_AXES + 2) + 1, 256);
    size_t length = 0, offset = 0, axis;
    append(header, &length, "{");
    for (int i = 0; i < answer->output_count; i++) {
        const Array *array = answer->outputs[i];
        const char *comma = i ? "," : "", *dtype = DTYPES[array->dtype].name;
        append(header, &length, "%s\"%s\":{\"dtype\":\"%s\",\"shape\":[", comma, array->name, dtype);
        for (axis = 0; axis < (size_t)array->rank; axis++)
            append(header, &length, "%s%" PRId64, axis ? "," : "", array->shape[axis]);
        size_t end = offset + (size_t)array->count * DTYPES[array->dtype].size;
        append(header, &length, "],\"data_offsets\":[%zu,%zu]}", offset, end);
        offset = end;
    }
    append(header, &length, "}");
    unsigned char *bytes = allocate(offset, 1), *to = bytes;
    for (int i = 0; i < answer->output_count; i++)
        for (int64_t k = 0; k < answer->outputs[i]->count; k++, to += DTYPES[answer->outputs[i]->dtype].size)
            write_element(answer->outputs[i], k, to);
    uint64_t size = length;
    FILE *file = fopen(path, "wb");
    bool written = file && fwrite(&size, 8, 1, file) == 1 && fwrite(header, 1, length, file) == length
                   && fwrite(bytes, 1, offset, file) == offset;
    return file && !fclose(file) && written;
}

/* ---- Questions and answers ---- */

const Array *array_of(const Question *question, const char *name) {
    for (int i = 0; i < question->array_count; i++)
        if (!strcmp(question->arrays[i].name, name)) return &question->arrays[i];
    return NULL;
}

const Json *option_of(const Question *question, const char *name) {
    for (const Json *value = question->options->first; value; value = value->next)
        if (!strcmp(value->key, name)) return value->kind == JSON_NULL ? NULL : value;
    return NULL;
}

double number_of(const Json *value) {
    const char *name = text_of(value, "number");
    char *end = NULL;
    double number = name ? strtod(name, &end) : NAN;
    if (name) return *end ? NAN : number;
    return value && value->kind == JSON_NUMBER ? value->number : NAN;
}

bool asks_for(const Question *question, const char *output) {
    for (const Json *name = question->outputs->first; name; name = name->next)
        if (name->kind == JSON_STRING && !strcmp(name->string, output)) return true;
    return false;
}

Array *new_output(Answer *answer, const char *name, Dtype dtype, int rank, const int64_t *shape) {
    Array *array = allocate(1, sizeof *array);
    *array = (Array){.name = name, .dtype = dtype, .rank = rank, .count = 1};
    for (int axis = 0; axis < rank; axis++)
        if (__builtin_mul_overflow(array->count, array->shape[axis] = shape[axis], &array->count))
            array->count = INT64_MAX; /* for which there is no memory */
    array->numbers = allocate((size_t)array->count, sizeof(double));
    return answer->outputs[answer->output_count++] = array;
}

bool refuse(Answer *answer, AnswerKind kind, const char *reason, ...) {
    va_list arguments;
    va_start(arguments, reason);
    vsnprintf(answer->reason, sizeof answer->reason, reason, arguments);
    va_end(arguments);
    answer->kind = kind;
    return false;
}

/* Give the time in seconds, from any beginning. */
static double seconds_now(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec + 1e-9 * (double)now.tv_nsec;
}

static void print_answer(int64_t number, const Answer *answer, double seconds) {
    static const char *kinds[] = {"returned", "unsupported", "raised", "lost"};
    printf("{\"message\": \"answer\", \"number\": %" PRId64 ", \"kind\": \"%s\", \"seconds\": %.9f", number,
           kinds[answer->kind], seconds);
    if (answer->kind != RETURNED) printf(", \"reason\": \"");
    for (const char *symbol = answer->reason; *symbol; symbol++)
        if (*symbol == '"' || *symbol == '\\' || (unsigned char)*symbol < ' ') printf("\\u%04x", *symbol);
        else putchar(*symbol);
    printf(answer->kind != RETURNED ? "\"}\n" : "}\n");
    fflush(stdout);
}

static bool answer_question(const Json *message, void (*answer_to)(const Question *, Answer *)) {
    Answer answer = {.kind = RETURNED};
    Question question = {.function = text_of(message, "function"),
                         .options = member(message, "options", JSON_OBJECT),
                         .outputs = member(message, "outputs", JSON_LIST)};
    const char *arrays = text_of(message, "arrays"), *path = text_of(message, "answer");
    int64_t number;
    size_t size = 0;
    if (!read_count(member(message, "number", JSON_NUMBER), &number)) return false;
    if (!question.function || !question.options || !question.outputs || !arrays || !path) return false;
    double seconds = 0;
    unsigned char *bytes = read_file(arrays, &size);
    if (bytes && read_arrays(bytes, size, &question)) {
        double start = seconds_now();
        answer_to(&question, &answer);
        seconds = seconds_now() - start;
    } else refuse(&answer, LOST, "the file `arrays` cannot be read");
    if (answer.kind == RETURNED && !write_file(path, &answer))
        refuse(&answer, RAISED, "the file `answer` cannot be written");
    print_answer(number, &answer, seconds);
    return true;
}

static const char *const REFUSAL =
    "{\"message\": \"refusal\", \"reason\": \"this program speaks mha-spec-protocol/1\"}";

int answer_questions(const char *claims, void (*answer_to)(const Question *, Answer *)) {
    char *line = NULL;
    size_t capacity = 0;
    ssize_t length;
    bool valid = true;
    while (valid && (length = getline(&line, &capacity, stdin)) > 0) {
        const Json *message = read_json(line, (size_t)length);
        const char *name = text_of(message, "message"), *protocol = text_of(message, "protocol");
        if (name && !strcmp(name, "question")) valid = answer_question(message, answer_to);
        else if (name && !strcmp(name, "hello")) {
            puts(protocol && !strcmp(protocol, "mha-spec-protocol/1") ? claims : REFUSAL);
            fflush(stdout);
        } else valid = false;
        release_all();
    }
    free(line);
    if (!valid) fprintf(stderr, "standard input has a line that is not a message of mha-spec-protocol/1\n");
    return !valid;
}
