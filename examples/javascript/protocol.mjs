// A reader and writer of the protocol that docs/protocol.md describes, for Node without packages.
import { readFileSync, writeFileSync, writeSync } from "node:fs";
import { createInterface } from "node:readline";

const PROTOCOL = "mha-spec-protocol/1";

const ELEMENTS = {
  BOOL: Uint8Array, U8: Uint8Array, I8: Int8Array, U16: Uint16Array, I16: Int16Array, U32: Uint32Array, I32: Int32Array,
  U64: BigUint64Array, I64: BigInt64Array, F32: Float32Array, F64: Float64Array,
};

/** The call is not supported; the case does not count. */
export class Unsupported extends Error {}

/** The file of the arrays cannot be read. */
class Lost extends Error {}

/** Give the number of elements of a shape. */
export const sizeOf = (shape) => shape.reduce((product, length) => product * length, 1);

/** Read a safetensors file as { name: { dtype, shape, data } }; the integers of 64 bits are of the type bigint. */
function readArrays(path) {
  const file = readFileSync(path);
  const length = Number(file.readBigUInt64LE(0));
  const header = JSON.parse(file.toString("utf8", 8, 8 + length));
  delete header.__metadata__;
  return Object.fromEntries(Object.entries(header).map(([name, entry]) => [name, readArray(file, 8 + length, entry)]));
}

function readArray(file, start, { dtype, shape, data_offsets: [begin, end] }) {
  const Elements = ELEMENTS[dtype];
  if (Elements === undefined) throw new Unsupported(`arrays of ${dtype} are not supported`);
  // A view of a typed array must be aligned in its buffer, which a file does not promise, so the bytes are copied.
  const bytes = new Uint8Array(file.subarray(start + begin, start + end));
  const data = new Elements(bytes.buffer);
  if (bytes.length !== end - begin || data.length !== sizeOf(shape)) throw new Error("an array has a wrong length");
  return { dtype, shape, data };
}

/** Write { name: { shape, data } } as a safetensors file. */
function writeArrays(path, arrays) {
  const header = {};
  let end = 0;
  for (const [name, { shape, data }] of Object.entries(arrays)) {
    const dtype = data instanceof Float64Array ? "F64" : "F32";
    header[name] = { dtype, shape, data_offsets: [end, (end += data.byteLength)] };
  }
  const text = Buffer.from(JSON.stringify(header));
  const length = Buffer.alloc(8);
  length.writeBigUInt64LE(BigInt(text.length));
  const parts = Object.values(arrays).map(({ data }) => Buffer.from(data.buffer, data.byteOffset, data.byteLength));
  writeFileSync(path, Buffer.concat([length, text, ...parts]));
}

/** Read an option; JSON has no NaN and no infinities, which are written { number: "nan" }. */
function readOption(value) {
  const names = { nan: NaN, inf: Infinity, "-inf": -Infinity };
  return value !== null && typeof value === "object" && "number" in value ? names[value.number] : value;
}

function readQuestion({ arrays, options, ...question }) {
  const entries = Object.entries(options).map(([name, value]) => [name, readOption(value)]);
  try {
    return { ...question, options: Object.fromEntries(entries), arrays: readArrays(arrays) };
  } catch (error) {
    throw error instanceof Unsupported ? error : new Lost(error.message);
  }
}

function answer(functions, message) {
  const start = performance.now();
  try {
    const question = readQuestion(message);
    if (!(message.function in functions)) throw new Unsupported(`this program has no function ${message.function}`);
    const outputs = functions[message.function](question.arrays, question.options);
    const asked = Object.entries(outputs).filter(([name]) => message.outputs.includes(name));
    writeArrays(message.answer, Object.fromEntries(asked));
    return { kind: "returned", seconds: (performance.now() - start) / 1000 };
  } catch (error) {
    const kind = error instanceof Unsupported ? "unsupported" : error instanceof Lost ? "lost" : "raised";
    return { kind, reason: `${error.name}: ${error.message}`.slice(0, 2000) };
  }
}

/** Answer the runner until it closes the standard input: first with the claims, then with the functions by name. */
export async function answerQuestions(claims, functions) {
  // The answer must reach the runner at once; process.stdout may keep it.
  const send = (message) => writeSync(1, JSON.stringify(message) + "\n");
  for await (const line of createInterface({ input: process.stdin })) {
    const message = JSON.parse(line);
    const { number } = message;
    if (message.message === "question") send({ message: "answer", number, ...answer(functions, message) });
    else if (message.protocol === PROTOCOL) send({ message: "claims", protocol: PROTOCOL, ...claims });
    else send({ message: "refusal", reason: `this program speaks ${PROTOCOL}` });
  }
}
