// A reader and writer of the protocol that docs/protocol.md describes, for Node without packages.
import { readFileSync, writeFileSync, writeSync } from "node:fs";

const PROTOCOL = "mha-spec-protocol/1";

const ELEMENTS = {
  BOOL: Uint8Array, U8: Uint8Array, I8: Int8Array, U16: Uint16Array, I16: Int16Array, U32: Uint32Array, I32: Int32Array,
  U64: BigUint64Array, I64: BigInt64Array, F32: Float32Array, F64: Float64Array,
};

/** The call is not supported; the case does not count. */
export class Unsupported extends Error {}

/** The file of the arrays cannot be read. */
class Lost extends Error {}

const isCount = (value) => Number.isSafeInteger(value) && value >= 0;

const isObject = (value) => value instanceof Object && !Array.isArray(value);

/** Give the number of elements of a shape. */
export const sizeOf = (shape) => shape.reduce((product, length) => product * length, 1);

/** Read a safetensors file as { name: { dtype, shape, data } }; the integers of 64 bits are of the type bigint. */
function readArrays(path) {
  const file = readFileSync(path);
  const length = Number(file.readBigUInt64LE(0));
  const header = JSON.parse(file.toString("utf8", 8, 8 + length));
  if (8 + length > file.length || !isObject(header)) throw new Error("the file has no header");
  delete header.__metadata__;
  return Object.fromEntries(Object.entries(header).map(([name, entry]) => [name, readArray(file, 8 + length, entry)]));
}

function readArray(file, start, { dtype, shape, data_offsets: [begin, end] }) {
  const Elements = ELEMENTS[dtype];
  if (Elements === undefined) throw new Unsupported(`arrays of ${dtype} are not supported`);
  // A view of a typed array must be aligned in its buffer, which a file does not promise, so the bytes are copied.
  const bytes = new Uint8Array(file.subarray(start + begin, start + end));
  const data = new Elements(bytes.buffer);
  const valid = [begin, end, ...shape].every(isCount) && bytes.length === end - begin && data.length === sizeOf(shape);
  if (!valid) throw new Error("an array has a wrong length");
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
  const numbers = { nan: NaN, inf: Infinity, "-inf": -Infinity };
  return numbers[value.number] ?? value;
}

/** Read the options without those that are null. */
function readOptions(options) {
  const present = Object.entries(options).filter(([, value]) => value !== null);
  return Object.fromEntries(present.map(([name, value]) => [name, readOption(value)]));
}

/** Read the arrays of a question; a file that cannot be read is lost. */
function readQuestion({ arrays: path, options }) {
  try {
    return { arrays: readArrays(path), options: readOptions(options) };
  } catch (error) {
    throw error instanceof Unsupported ? error : new Lost(error.message);
  }
}

async function answer(functions, message) {
  try {
    const { arrays, options } = readQuestion(message);
    if (!Object.hasOwn(functions, message.function))
      throw new Unsupported(`this program has no function ${message.function}`);
    const start = performance.now();
    const outputs = await functions[message.function](arrays, options);
    const seconds = (performance.now() - start) / 1000;
    const asked = Object.entries(outputs).filter(([name]) => message.outputs.includes(name));
    writeArrays(message.answer, Object.fromEntries(asked));
    return { kind: "returned", seconds };
  } catch (error) {
    const kind = error instanceof Unsupported ? "unsupported" : error instanceof Lost ? "lost" : "raised";
    return { kind, reason: `${error.name}: ${error.message}`.slice(0, 2000) };
  }
}

/** Give the lines of a stream. The module readline would end a line at U+2028, too, which JSON has within strings. */
async function* linesOf(stream) {
  let rest = "";
  for await (const chunk of stream.setEncoding("utf8")) {
    const lines = (rest + chunk).split("\n");
    rest = lines.pop();
    yield* lines;
  }
}

/** Read a message, or throw if the line is not one. */
function readMessage(line) {
  const message = JSON.parse(line);
  const { number, arrays, options, outputs, answer: path } = message;
  const isText = (value) => typeof value === "string";
  const isQuestion =
    message.message === "question" && isCount(number) && [message.function, arrays, path].every(isText) &&
    Array.isArray(outputs) && isObject(options);
  if (!isQuestion && message.message !== "hello") throw new Error("the line is not a message");
  return message;
}

/**
 * Answer the runner until it closes the standard input: first with the claims, then with the functions by name, which may
 * be asynchronous. A line that is not a message ends the program with the exit status 1.
 */
export async function answerQuestions(claims, functions) {
  // The answer must reach the runner at once; process.stdout may keep it.
  const send = (message) => writeSync(1, JSON.stringify(message) + "\n");
  for await (const line of linesOf(process.stdin)) {
    let message;
    try {
      message = readMessage(line);
    } catch {
      console.error(`standard input has a line that is not a message of ${PROTOCOL}`);
      process.exit(1);
    }
    const { number, protocol } = message;
    if (message.message === "question") send({ message: "answer", number, ...(await answer(functions, message)) });
    else if (protocol === PROTOCOL) send({ message: "claims", protocol, ...claims });
    else send({ message: "refusal", reason: `this program speaks ${PROTOCOL}` });
  }
}
