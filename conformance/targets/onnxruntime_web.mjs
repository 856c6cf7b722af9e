// ONNX Runtime Web's `Attention` in WebAssembly under Node, unchanged, and a target of the suite:
//
//     mha-spec check --command "node conformance/targets/onnxruntime_web.mjs"
//
// For each signature a model of a single node is built in memory, as in onnxruntime_attention.py. Mask and bias are the
// same input, `attn_mask`, and the causal diagonal begins at the upper left. NODE_PATH must name the packages of
// package.json.
import { createRequire } from "node:module";
import { answerQuestions, Unsupported } from "../../examples/javascript/protocol.mjs";

const ort = createRequire(import.meta.url)("onnxruntime-web");
ort.env.wasm.numThreads = 1;
ort.env.logLevel = "fatal";

const CLAIMS = {
  functions: { attention: ["mask", "bias", "causal", "scale", "softcap"] },
  dtypes: ["float32"],
  conventions: { causal_alignment: "upper_left" },
  versions: { "onnxruntime-web": ort.env.versions.web, node: process.versions.node },
};

const OPSET = 24, IR_VERSION = 11;

/** The numbers of the types in ONNX, and the names of the types in ONNX Runtime. */
const TYPES = { F32: [1, "float32"], BOOL: [9, "bool"] };

/** The types of an attribute. */
const FLOAT = 1, INT = 2;

/** The models by signature. */
const sessions = new Map();

/** Run the node on the arrays { name: { dtype, shape, data } }. */
async function attention({ query, key, value, mask, bias }, options) {
  if (mask && bias) throw new Unsupported("attn_mask is either boolean or floating-point, not both");
  if (bias && bias.dtype !== "F32") throw new Unsupported(`the kernel takes no bias in ${bias.dtype}`);
  const pairs = mask ?? bias;
  const arrays = { Q: query, K: key, V: value, ...(pairs && { attn_mask: pairs }) };
  const feeds = Object.fromEntries(
    Object.entries(arrays).map(([name, { dtype, shape, data }]) => [name, new ort.Tensor(TYPES[dtype][1], data, shape)]),
  );
  const session = await sessionOf(Object.entries(arrays).map(([name, { dtype }]) => [name, dtype]), options);
  const { Y } = await session.run(feeds);
  return { output: { shape: Y.dims, data: Y.data } };
}

/** Build and load the model with these inputs and attributes. */
async function sessionOf(inputs, { causal = false, scale, softcap }) {
  const signature = JSON.stringify([inputs, causal, scale, softcap]);
  if (!sessions.has(signature)) {
    const attributes = [attribute("is_causal", INT, Number(causal))];
    if (scale !== undefined) attributes.push(attribute("scale", FLOAT, scale));
    if (softcap !== undefined) attributes.push(attribute("softcap", FLOAT, softcap));
    sessions.set(signature, await ort.InferenceSession.create(model(inputs, attributes), { executionProviders: ["wasm"] }));
  }
  return sessions.get(signature);
}

/** Encode a ModelProto of a node; the numbers are those of the fields in onnx.proto. */
function model(inputs, attributes) {
  const node = [...inputs.map(([name]) => bytes(1, name)), bytes(2, "Y"), bytes(4, "Attention"), ...attributes];
  const graph = [
    bytes(1, node), bytes(2, "attention"), ...inputs.map(([name, dtype]) => bytes(11, valueInfo(name, dtype))),
    bytes(12, valueInfo("Y", "F32")),
  ];
  return Buffer.concat([number(1, IR_VERSION), bytes(7, graph), bytes(8, [bytes(1, ""), number(2, OPSET)])]);
}

/** Encode the name and type of an array of any shape as a ValueInfoProto. */
const valueInfo = (name, dtype) => [bytes(1, name), bytes(2, [bytes(1, [number(1, TYPES[dtype][0])])])];

/** Encode an AttributeProto as a field of a node. */
function attribute(name, type, value) {
  const single = Buffer.alloc(5);
  single[0] = (2 << 3) | 5; // the field `f`, of 4 bytes
  single.writeFloatLE(type === FLOAT ? value : 0, 1);
  return bytes(5, [bytes(1, name), type === FLOAT ? single : number(3, value), number(20, type)]);
}

/** Encode a field of Protocol Buffers that is an integer. */
const number = (field, value) => Buffer.concat([varint(field << 3), varint(value)]);

/** Encode a field of Protocol Buffers that is a text, or a message of parts. */
function bytes(field, content) {
  const data = typeof content === "string" ? Buffer.from(content) : Buffer.concat(content);
  return Buffer.concat([varint((field << 3) | 2), varint(data.length), data]);
}

/** Encode an integer that is not negative, seven bits in a byte. */
function varint(value) {
  const encoded = [];
  for (; value > 127; value = Math.floor(value / 128)) encoded.push((value % 128) | 128);
  return Buffer.from([...encoded, value]);
}

await answerQuestions(CLAIMS, { attention });
