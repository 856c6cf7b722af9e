// Multi-head attention in JavaScript, and a target of the suite:
//
//     mha-spec check --command "node attention.mjs"
//
// `attend` is the attention of one row: numbers of JavaScript have 64 bits, and results are rounded once, when they
// are stored. The ids in the comments are clauses of SPEC.md.
import { answerQuestions, sizeOf, Unsupported } from "./protocol.mjs";

const CLAIMS = {
  functions: {
    attention: [
      "mask", "bias", "causal", "q_offset", "window", "q_lengths", "kv_lengths", "q_segment_ids", "kv_segment_ids",
      "scale", "softcap", "sinks", "dropout_mask", "dropout_rate", "return_lse",
    ],
  },
  dtypes: ["float64", "float32"],
  versions: { node: process.versions.node },
};

/** The largest offset, length and window bound (MHA-POS-1). */
const MOST = 2 ** 30;

/** A bound of a window that excludes no key. */
const UNBOUNDED = Infinity;

/** The largest finite number and the smallest normal one of a type. */
const RANGE = { F64: [Number.MAX_VALUE, 2 ** -1022], F32: [(2 - 2 ** -23) * 2 ** 127, 2 ** -126] };

/** Give output and lse of the arrays { name: { dtype, shape, data } }, and of the options. */
function attention(arrays, options) {
  const call = checked(arrays, options);
  const Elements = call.query.data.constructor;
  const output = { shape: [call.batch, call.heads, call.qLen, call.vDim] };
  const lse = { shape: output.shape.slice(0, 3) };
  output.data = new Elements(sizeOf(output.shape));
  lse.data = new Elements(sizeOf(lse.shape));
  let row = 0;
  for (let b = 0; b < call.batch; b++)
    for (let h = 0; h < call.heads; h++)
      for (let i = 0; i < call.qLen; i++, row++) {
        const result = attend(call, b, h, i);
        output.data.set(result.output, row * call.vDim);
        lse.data[row] = result.lse;
      }
  return { output, lse };
}

/** Give output and lse of a row. Hidden pairs are not evaluated, so that nothing that they hold reaches the result. */
function attend(call, b, h, i) {
  const sink = call.sinks ? call.sinks.data[h] : -Infinity;
  const output = new Float64Array(call.vDim);
  const keys = [];
  for (let j = 0; j < call.kvLen; j++) if (visible(call, b, h, i, j)) keys.push(j);
  if (keys.length === 0) return { output, lse: sink }; // MHA-EMPTY-1, MHA-EMPTY-2
  const logits = keys.map((j) => logit(call, b, h, i, j));
  const largest = logits.reduce((most, x) => Math.max(most, x), sink);
  const exponentials = logits.map((x) => Math.exp(x - largest));
  const sum = exponentials.reduce((total, x) => total + x, Math.exp(sink - largest));
  keys.forEach((j, k) => {
    const weight = (exponentials[k] / sum) * kept(call, b, h, i, j);
    const start = ((b * call.kvHeads + kvHead(call, h)) * call.kvLen + j) * call.vDim;
    for (let c = 0; c < call.vDim; c++) output[c] += weight * call.value.data[start + c];
  });
  return { output, lse: largest + Math.log(sum) };
}

/** Tell whether query i may attend to key j (MHA-MASK-3). */
function visible(call, b, h, i, j) {
  const distance = j - (call.offsets[b] + i);
  return (
    -call.left <= distance && distance <= call.right &&
    i < call.qLengths[b] && j < call.kvLengths[b] &&
    (!call.mask || call.mask.data[at(call.mask, b, h, i, j)] === 1) &&
    (!call.bias || biasOf(call, b, h, i, j) !== -Infinity) &&
    // == compares a number and a bigint by their values (MHA-SEG-1).
    (!call.qIds || call.qIds.data[b * call.qLen + i] == call.kvIds.data[b * call.kvLen + j])
  );
}

function logit(call, b, h, i, j) {
  const query = ((b * call.heads + h) * call.qLen + i) * call.qkDim;
  const key = ((b * call.kvHeads + kvHead(call, h)) * call.kvLen + j) * call.qkDim;
  let score = 0;
  for (let c = 0; c < call.qkDim; c++) score += call.query.data[query + c] * call.key.data[key + c];
  score *= call.scale;
  if (call.softcap !== undefined) score = call.softcap * Math.tanh(score / call.softcap); // before the bias: MHA-CAP-2
  return call.bias ? score + biasOf(call, b, h, i, j) : score;
}

/** Give the factor of a weight by dropout (MHA-DROP-1). */
function kept(call, b, h, i, j) {
  if (call.dropoutMask && !call.dropoutMask.data[at(call.dropoutMask, b, h, i, j)]) return 0;
  return 1 / (1 - call.dropoutRate);
}

/** Give the bias, converted to the type of the softmax (MHA-BIAS-2). */
function biasOf(call, b, h, i, j) {
  const bias = call.bias.data[at(call.bias, b, h, i, j)];
  return call.query.dtype === "F64" ? bias : Math.fround(bias);
}

/** Give the head of key and value that a query head reads (MHA-HEAD-1). */
const kvHead = (call, h) => Math.floor(h / (call.heads / call.kvHeads));

/** Give the index of (b, h, i, j) in an array of rank 4 in which each axis may have size 1. */
const at = ({ shape }, ...index) =>
  index.reduce((place, n, axis) => place * shape[axis] + (shape[axis] === 1 ? 0 : n), 0);

function check(condition, text) {
  if (!condition) throw new TypeError(text);
}

/** Check all arguments, and give them as one object. */
function checked(arrays, options) {
  const call = { ...operands(arrays), ...numbers(options, RANGE[arrays.query.dtype]) };
  call.scale ??= 1 / Math.sqrt(call.qkDim);
  const full = [call.batch, call.heads, call.qLen, call.kvLen];
  call.mask = pairs(arrays, "mask", full, ["BOOL"]);
  call.bias = pairs(arrays, "bias", full, ["F32", "F64"]);
  call.dropoutMask = pairs(arrays, "dropout_mask", full, ["BOOL"]);
  if (call.dropoutRate > 0 && !call.dropoutMask) throw new Unsupported("dropout needs a `dropout_mask`");
  call.sinks = arrays.sinks;
  const validSinks = !call.sinks || (isFloating(call.sinks) && isShape(call.sinks, [call.heads]));
  check(validSinks, "`sinks` must be floating, of shape (heads,)");
  call.qLengths = integers(arrays, "q_lengths", call.batch, 0, call.qLen) ?? Array(call.batch).fill(call.qLen);
  call.kvLengths = integers(arrays, "kv_lengths", call.batch, 0, call.kvLen) ?? Array(call.batch).fill(call.kvLen);
  call.qIds = segments(arrays, "q_segment_ids", [call.batch, call.qLen]);
  call.kvIds = segments(arrays, "kv_segment_ids", [call.batch, call.kvLen]);
  check(!call.qIds === !call.kvIds, "`q_segment_ids` and `kv_segment_ids` need each other");
  return { ...call, ...positions(arrays, options, call) };
}

/** Check query, key and value, and read the sizes (MHA-SHAPE-2, MHA-SHAPE-3, MHA-HEAD-2). */
function operands({ query, key, value }) {
  for (const [name, array] of Object.entries({ query, key, value })) {
    check(array?.shape.length === 4 && array.shape[1] > 0 && array.shape[3] > 0, `\`${name}\` has a wrong shape`);
    const valid = isFloating(array) && array.dtype === query.dtype;
    check(valid, `\`${name}\` must be floating, of the dtype of \`query\``);
  }
  const [batch, heads, qLen, qkDim] = query.shape;
  const [, kvHeads, kvLen] = key.shape;
  check(isShape(key, [batch, kvHeads, kvLen, qkDim]), "`key` must have the batch and qk_dim of `query`");
  const valueShape = [batch, kvHeads, kvLen, value.shape[3]];
  check(isShape(value, valueShape), "`value` must have the batch, heads and length of `key`");
  check(heads % kvHeads === 0, `heads=${heads} must be a multiple of kv_heads=${kvHeads}`);
  return { query, key, value, batch, heads, qLen, qkDim, kvHeads, kvLen, vDim: value.shape[3] };
}

const isFloating = ({ dtype }) => dtype in RANGE;

const isInteger = ({ dtype }) => /^[IU]/.test(dtype);

const isShape = ({ shape }, expected) =>
  shape.length === expected.length && shape.every((length, axis) => length === expected[axis]);

/** Give an array that broadcasts to (batch, heads, q_len, kv_len), or undefined (MHA-MASK-2). */
function pairs(arrays, name, full, dtypes) {
  const array = arrays[name];
  if (array === undefined) return undefined;
  check(dtypes.includes(array.dtype), `\`${name}\` must be ${dtypes.join(" or ")}, received ${array.dtype}`);
  const broadcasts = array.shape.length === 4 && array.shape.every((n, axis) => n === 1 || n === full[axis]);
  check(broadcasts, `\`${name}\` must broadcast to (batch, heads, q_len, kv_len)`);
  return array;
}

/** Give the integers of an array of shape (batch,), or undefined (MHA-LEN-3). */
function integers(arrays, name, batch, least, most) {
  const array = arrays[name];
  if (array === undefined) return undefined;
  check(isInteger(array) && isShape(array, [batch]), `\`${name}\` must be integers of shape (batch,)`);
  const values = Array.from(array.data, Number);
  check(values.every((n) => least <= n && n <= most), `\`${name}\` must lie in [${least}, ${most}]`);
  return values;
}

function segments(arrays, name, shape) {
  const array = arrays[name];
  const valid = !array || (isInteger(array) && isShape(array, shape));
  check(valid, `\`${name}\` must be integers, one for each token`);
  return array;
}

/** Read scale, softcap and dropout_rate (MHA-ARG-2). */
function numbers({ scale, softcap, dropout_rate: dropoutRate = 0 }, [most, least]) {
  const lies = (value, from, to) => typeof value === "number" && from <= value && value <= to;
  check(scale === undefined || lies(scale, -most, most), "`scale` must be finite");
  check(softcap === undefined || lies(softcap, least, most), "`softcap` must be above 0");
  check(lies(dropoutRate, 0, 1) && dropoutRate < 1, "`dropout_rate` must lie in [0, 1)");
  return { scale, softcap, dropoutRate };
}

/** Read the window, the causal diagonal, which is a right bound of 0, and the offsets (MHA-WINDOW, MHA-POS). */
function positions(arrays, { causal = false, window = [null, null], q_offset: offset }, call) {
  check(typeof causal === "boolean", "`causal` must be a boolean");
  const isBound = (n) => n === null || (Number.isInteger(n) && 0 <= n && n <= MOST);
  const isWindow = Array.isArray(window) && window.length === 2 && window.every(isBound);
  check(isWindow, "`window` must be a pair, each null or an integer from 0 to 2^30");
  const [left, right] = window.map((bound) => bound ?? UNBOUNDED);
  const bounds = { left, right: causal ? Math.min(right, 0) : right };
  const array = integers(arrays, "q_offset", call.batch, -MOST, MOST);
  const positioned = bounds.left < UNBOUNDED || bounds.right < UNBOUNDED;
  const ambiguous = call.qLen !== call.kvLen || arrays.kv_lengths !== undefined;
  const placed = array || offset !== undefined || !(positioned && ambiguous);
  check(placed, '`q_offset` is required: "upper_left" or "lower_right"');
  const lowerRight = call.kvLengths.map((length, b) => length - call.qLengths[b]);
  if (offset === "lower_right") return { ...bounds, offsets: lowerRight };
  const number = offset === undefined || offset === "upper_left" ? 0 : offset;
  check(Number.isInteger(number) && Math.abs(number) <= MOST, "`q_offset` must be an integer or the name of a reading");
  return { ...bounds, offsets: array ?? Array(call.batch).fill(number) };
}

answerQuestions(CLAIMS, { attention });
