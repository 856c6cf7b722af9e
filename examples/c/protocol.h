/* A reader and writer of the protocol that docs/protocol.md describes. It needs only the C library and POSIX.
 *
 * A target passes its claims and one function to `answer_questions`. All memory of a question is released after its
 * answer. The code that calls it may be C++.
 */
#ifndef MHA_SPEC_PROTOCOL_H
#define MHA_SPEC_PROTOCOL_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

enum { MOST_AXES = 8, MOST_OUTPUTS = 8, MOST_REASON = 400 };

typedef enum { BOOL, U8, I8, U16, I16, U32, I32, U64, I64, F16, BF16, F32, F64 } Dtype;

/* The elements of a floating array are `numbers`, converted to double, which is exact; those of all others are
 * `integers`. An element of U64 above INT64_MAX is the negative integer with the same bits. */
typedef struct {
    const char *name;
    Dtype dtype;
    int rank;
    int64_t shape[MOST_AXES];
    int64_t count;
    double *numbers;
    int64_t *integers;
} Array;

typedef enum { JSON_NULL, JSON_BOOL, JSON_NUMBER, JSON_STRING, JSON_LIST, JSON_OBJECT } JsonKind;

/* A value of JSON; `key` is the name of a member of an object. */
typedef struct Json {
    JsonKind kind;
    const char *key;
    double number; /* also the value of a boolean */
    const char *string;
    struct Json *first, *next;
    int count;
} Json;

typedef struct {
    const char *function;
    const Array *arrays;
    int array_count;
    const Json *options;
    const Json *outputs;
} Question;

typedef enum { RETURNED, UNSUPPORTED, RAISED, LOST } AnswerKind;

typedef struct {
    AnswerKind kind;
    char reason[MOST_REASON];
    Array *outputs[MOST_OUTPUTS];
    int output_count;
} Answer;

/* Give the array of that name, or NULL if the question does not have it. */
const Array *array_of(const Question *question, const char *name);

/* Give the option of that name, or NULL if the question does not have it or it is null. */
const Json *option_of(const Question *question, const char *name);

/* Give the number that a value holds, NaN and infinities included; NaN if it holds none. */
double number_of(const Json *value);

/* Tell whether the question asks for that output. */
bool asks_for(const Question *question, const char *output);

/* Add an output, whose numbers the target then writes; they are rounded to `dtype` when the file is written. */
Array *new_output(Answer *answer, const char *name, Dtype dtype, int rank, const int64_t *shape);

/* Give memory that is filled with zeros and released after the answer. */
void *allocate(size_t count, size_t size);

/* Let the answer say that the call is UNSUPPORTED, or that it RAISED an error, with a reason; give false. */
bool refuse(Answer *answer, AnswerKind kind, const char *reason, ...) __attribute__((format(printf, 3, 4)));

/* Reply to `hello` with the claims, then answer every question; give the exit status. */
int answer_questions(const char *claims, void (*answer_to)(const Question *, Answer *));

#ifdef __cplusplus
}
#endif

#endif
