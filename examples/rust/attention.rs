//! Multi-head attention in Rust, and a target of the suite:
//!
//! ```text
//! rustc --edition 2021 -O attention.rs
//! mha-spec check --command ./attention
//! ```
//!
//! `attend` is the attention of one row: it works in f64, and results are rounded once, when they are written. The
//! ids in the comments are clauses of SPEC.md.

mod protocol;

use std::process::ExitCode;

use protocol::{answer_questions, Array, Elements, Json, Outputs, Question, Refusal};

const CLAIMS: &str = concat!(
    r#"{"message": "claims", "protocol": "mha-spec-protocol/1", "functions": {"attention": ["mask", "bias", "#,
    r#""causal", "q_offset", "window", "q_lengths", "kv_lengths", "q_segment_ids", "kv_segment_ids", "scale", "#,
    r#""softcap", "sinks", "dropout_mask", "dropout_rate", "return_lse"]}, "dtypes": ["float64", "float32"]}"#
);

/// The largest offset, length and window bound (MHA-POS-1).
const MOST: i64 = 1 << 30;

/// A bound of a window that excludes no key.
const UNBOUNDED: i64 = i64::MAX / 4;

/// The arguments after all checks.
struct Call<'a> {
    query: &'a Array,
    key: &'a Array,
    value: &'a Array,
    mask: Option<&'a Array>,
    bias: Option<&'a Array>,
    dropout_mask: Option<&'a Array>,
    sinks: Option<&'a [f64]>,
    segments: Option<(&'a [i128], &'a [i128])>,
    sizes: Sizes,
    q_lengths: Vec<i64>,
    kv_lengths: Vec<i64>,
    /// The position of query 0 of each batch entry.
    offsets: Vec<i64>,
    window: (i64, i64),
    scale: f64,
    softcap: Option<f64>,
    dropout_rate: f64,
}

#[derive(Clone, Copy)]
struct Sizes {
    batch: usize,
    heads: usize,
    kv_heads: usize,
    q_len: usize,
    kv_len: usize,
    qk_dim: usize,
    v_dim: usize,
}

/// A query of a head and a batch entry.
#[derive(Clone, Copy)]
struct Row {
    b: usize,
    h: usize,
    i: usize,
}

// ---- The attention ----

fn attention(call: &Call) -> (Vec<f64>, Vec<f64>) {
    let sizes = call.sizes;
    let (mut output, mut lse) = (Vec::new(), Vec::new());
    for b in 0..sizes.batch {
        for h in 0..sizes.heads {
            for i in 0..sizes.q_len {
                let (row_output, row_lse) = attend(call, Row { b, h, i });
                output.extend(row_output);
                lse.push(row_lse);
            }
        }
    }
    (output, lse)
}

/// Give output and lse of a row. Hidden pairs are not evaluated, so that nothing that they hold reaches the result.
fn attend(call: &Call, row: Row) -> (Vec<f64>, f64) {
    let sink = call.sinks.map_or(f64::NEG_INFINITY, |sinks| sinks[row.h]);
    let mut output = vec![0.0; call.sizes.v_dim];
    let keys: Vec<usize> = (0..call.sizes.kv_len).filter(|&j| visible(call, row, j)).collect();
    if keys.is_empty() {
        return (output, sink); // MHA-EMPTY-1, MHA-EMPTY-2
    }
    let logits: Vec<f64> = keys.iter().map(|&j| logit(call, row, j)).collect();
    let largest = logits.iter().fold(sink, |most, &x| most.max(x));
    let sum = logits.iter().fold((sink - largest).exp(), |sum, x| sum + (x - largest).exp());
    for (&j, x) in keys.iter().zip(&logits) {
        let weight = (x - largest).exp() / sum * kept(call, row, j);
        let value = vector(call.value, row.b, kv_head(call, row), j);
        output.iter_mut().zip(value).for_each(|(sum, v)| *sum += weight * v);
    }
    (output, largest + sum.ln())
}

/// Tell whether the query of the row may attend to key j (MHA-MASK-3).
fn visible(call: &Call, row: Row, j: usize) -> bool {
    let distance = j as i64 - (call.offsets[row.b] + row.i as i64);
    let sizes = call.sizes;
    -call.window.0 <= distance
        && distance <= call.window.1
        && (row.i as i64) < call.q_lengths[row.b]
        && (j as i64) < call.kv_lengths[row.b]
        && call.mask.map_or(true, |mask| mask.integers()[at(mask, row, j)] != 0)
        && call.bias.map_or(true, |bias| bias_at(call, bias, row, j) != f64::NEG_INFINITY)
        && call.segments.map_or(true, |(q, kv)| q[row.b * sizes.q_len + row.i] == kv[row.b * sizes.kv_len + j])
}

fn logit(call: &Call, row: Row, j: usize) -> f64 {
    let query = vector(call.query, row.b, row.h, row.i);
    let key = vector(call.key, row.b, kv_head(call, row), j);
    let mut score = call.scale * query.iter().zip(key).map(|(q, k)| q * k).sum::<f64>();
    if let Some(softcap) = call.softcap {
        score = softcap * (score / softcap).tanh(); // before the bias: MHA-CAP-2
    }
    call.bias.map_or(score, |bias| score + bias_at(call, bias, row, j))
}

/// Give the factor of a weight by dropout (MHA-DROP-1).
fn kept(call: &Call, row: Row, j: usize) -> f64 {
    match call.dropout_mask {
        Some(mask) if mask.integers()[at(mask, row, j)] == 0 => 0.0,
        _ => 1.0 / (1.0 - call.dropout_rate),
    }
}

/// Give the bias, converted to the type of the softmax (MHA-BIAS-2).
fn bias_at(call: &Call, bias: &Array, row: Row, j: usize) -> f64 {
    let number = bias.numbers()[at(bias, row, j)];
    match call.query.dtype.as_str() {
        "F64" => number,
        _ => (number as f32).into(),
    }
}

/// Give the head of key and value that the query head reads (MHA-HEAD-1).
fn kv_head(call: &Call, row: Row) -> usize {
    row.h / (call.sizes.heads / call.sizes.kv_heads)
}

/// Give the vector of a token.
fn vector(array: &Array, b: usize, head: usize, token: usize) -> &[f64] {
    let (heads, length, size) = (array.shape[1], array.shape[2], array.shape[3]);
    &array.numbers()[((b * heads + head) * length + token) * size..][..size]
}

/// Give the index of a pair in an array in which each axis may have size 1.
fn at(array: &Array, row: Row, j: usize) -> usize {
    let index = [row.b, row.h, row.i, j];
    array.shape.iter().zip(index).fold(0, |place, (&n, index)| place * n + if n == 1 { 0 } else { index })
}

// ---- The arguments ----

fn check(condition: bool, text: &str) -> Result<(), Refusal> {
    condition.then_some(()).ok_or_else(|| Refusal::Raised(text.to_string()))
}

/// Check query, key and value, and read the sizes (MHA-SHAPE-2, MHA-SHAPE-3, MHA-HEAD-2).
fn operands(question: &Question) -> Result<([&Array; 3], Sizes), Refusal> {
    let names = ["query", "key", "value"];
    let operand = |name: &str| question.arrays.get(name).ok_or_else(|| Refusal::Raised(format!("`{name}` is missing")));
    let arrays = [operand(names[0])?, operand(names[1])?, operand(names[2])?];
    for (name, array) in names.iter().zip(arrays) {
        let shape = &array.shape;
        let valid = shape.len() == 4 && shape[1] > 0 && shape[3] > 0;
        check(valid, &format!("`{name}` must have rank 4, and axes 1 and 3 above 0"))?;
        let floating = array.is_floating() && array.dtype == arrays[0].dtype;
        check(floating, &format!("`{name}` must be floating, of the dtype of `query`"))?;
    }
    let (query, key, value) = (&arrays[0].shape, &arrays[1].shape, &arrays[2].shape);
    check(key[0] == query[0] && key[3] == query[3], "`key` must have the batch and qk_dim of `query`")?;
    check(value[..3] == key[..3], "`value` must have the batch, heads and length of `key`")?;
    let (batch, heads, q_len, qk_dim) = (query[0], query[1], query[2], query[3]);
    let (kv_heads, kv_len, v_dim) = (key[1], key[2], value[3]);
    check(heads % kv_heads == 0, &format!("heads={heads} must be a multiple of kv_heads={kv_heads}"))?;
    Ok((arrays, Sizes { batch, heads, kv_heads, q_len, kv_len, qk_dim, v_dim }))
}

/// Give an array that broadcasts to (batch, heads, q_len, kv_len), if the question has it (MHA-MASK-2).
fn pairs<'a>(question: &'a Question, name: &str, sizes: Sizes) -> Result<Option<&'a Array>, Refusal> {
    let full = [sizes.batch, sizes.heads, sizes.q_len, sizes.kv_len];
    let array = question.arrays.get(name);
    if let Some(array) = array {
        let valid = if name == "bias" { array.is_floating() } else { array.dtype == "BOOL" };
        check(valid, &format!("`{name}` must not be {}", array.dtype))?;
        let broadcasts = array.shape.len() == 4 && array.shape.iter().zip(full).all(|(&n, size)| n == 1 || n == size);
        check(broadcasts, &format!("`{name}` must broadcast to (batch, heads, q_len, kv_len)"))?;
    }
    Ok(array)
}

/// Give the logits of the sinks, if the question has them (MHA-SINK-1).
fn sinks(question: &Question, sizes: Sizes) -> Result<Option<&[f64]>, Refusal> {
    let array = question.arrays.get("sinks");
    let valid = array.map_or(true, |array| array.is_floating() && array.shape == [sizes.heads]);
    check(valid, "`sinks` must be floating, of shape (heads,)")?;
    Ok(array.map(Array::numbers))
}

/// Give the integers of an array of that shape, if the question has it.
fn integers<'a>(question: &'a Question, name: &str, shape: &[usize]) -> Result<Option<&'a [i128]>, Refusal> {
    let array = question.arrays.get(name);
    let valid = array.map_or(true, |array| array.is_integer() && array.shape == shape);
    check(valid, &format!("`{name}` must be integers of shape {shape:?}"))?;
    Ok(array.map(Array::integers))
}

/// Give one integer for each batch entry, from `least` to `most` (MHA-LEN-3).
fn per_entry(q: &Question, name: &str, batch: usize, (least, most): (i64, i64)) -> Result<Option<Vec<i64>>, Refusal> {
    let values = integers(q, name, &[batch])?;
    let valid = values.map_or(true, |values| values.iter().all(|&n| i128::from(least) <= n && n <= i128::from(most)));
    check(valid, &format!("`{name}` must lie in [{least}, {most}]"))?;
    Ok(values.map(|values| values.iter().map(|&n| n as i64).collect()))
}

fn number(question: &Question, name: &str) -> Result<Option<f64>, Refusal> {
    let value = question.options.get(name);
    check(value.map_or(true, |value| value.number().is_some()), &format!("`{name}` must be a number"))?;
    Ok(value.and_then(Json::number))
}

/// Read the window and the causal diagonal, which is a right bound of 0 (MHA-WINDOW-2, MHA-ARG-3).
fn window(question: &Question) -> Result<(i64, i64), Refusal> {
    let bound = |value: &Json| match value {
        Json::Null => Ok(UNBOUNDED),
        Json::Number(n) if (0.0..=MOST as f64).contains(n) && n.fract() == 0.0 => Ok(*n as i64),
        _ => Err(Refusal::Raised("`window` must be a pair, each null or an integer from 0 to 2^30".to_string())),
    };
    let (left, right) = match question.options.get("window").map(|window| window.list().unwrap_or_default()) {
        None => (UNBOUNDED, UNBOUNDED),
        Some([left, right]) => (bound(left)?, bound(right)?),
        Some(_) => return Err(Refusal::Raised("`window` must be a pair".to_string())),
    };
    match question.options.get("causal") {
        None | Some(Json::Bool(false)) => Ok((left, right)),
        Some(Json::Bool(true)) => Ok((left, right.min(0))),
        Some(_) => Err(Refusal::Raised("`causal` must be a boolean".to_string())),
    }
}

/// Give each batch entry its offset: an array, an integer, or the name of a reading (MHA-POS-2).
fn offsets(question: &Question, call: &Call) -> Result<Vec<i64>, Refusal> {
    if let Some(offsets) = per_entry(question, "q_offset", call.sizes.batch, (-MOST, MOST))? {
        return Ok(offsets);
    }
    let positioned = call.window.0 < UNBOUNDED || call.window.1 < UNBOUNDED;
    let ambiguous = call.sizes.q_len != call.sizes.kv_len || question.arrays.contains_key("kv_lengths");
    match question.options.get("q_offset") {
        Some(Json::Text(name)) if name == "lower_right" => {
            Ok(call.kv_lengths.iter().zip(&call.q_lengths).map(|(kv_length, q_length)| kv_length - q_length).collect())
        }
        Some(Json::Text(name)) if name == "upper_left" => Ok(vec![0; call.sizes.batch]),
        Some(Json::Number(n)) if n.abs() <= MOST as f64 && n.fract() == 0.0 => Ok(vec![*n as i64; call.sizes.batch]),
        None if !(positioned && ambiguous) => Ok(vec![0; call.sizes.batch]),
        _ => Err(Refusal::Raised(r#"`q_offset` must be an integer, "upper_left" or "lower_right""#.to_string())),
    }
}

/// Check all arguments.
fn checked(question: &Question) -> Result<Call<'_>, Refusal> {
    let ([query, key, value], sizes) = operands(question)?;
    let q_segments = integers(question, "q_segment_ids", &[sizes.batch, sizes.q_len])?;
    let kv_segments = integers(question, "kv_segment_ids", &[sizes.batch, sizes.kv_len])?;
    check(q_segments.is_some() == kv_segments.is_some(), "`q_segment_ids` and `kv_segment_ids` need each other")?;
    let lengths = |name: &str, length: usize| -> Result<Vec<i64>, Refusal> {
        let lengths = per_entry(question, name, sizes.batch, (0, length as i64))?;
        Ok(lengths.unwrap_or_else(|| vec![length as i64; sizes.batch]))
    };
    let mut call = Call {
        query,
        key,
        value,
        mask: pairs(question, "mask", sizes)?,
        bias: pairs(question, "bias", sizes)?,
        dropout_mask: pairs(question, "dropout_mask", sizes)?,
        sinks: sinks(question, sizes)?,
        segments: q_segments.zip(kv_segments),
        sizes,
        q_lengths: lengths("q_lengths", sizes.q_len)?,
        kv_lengths: lengths("kv_lengths", sizes.kv_len)?,
        offsets: Vec::new(),
        window: window(question)?,
        scale: number(question, "scale")?.unwrap_or(1.0 / (sizes.qk_dim as f64).sqrt()),
        softcap: number(question, "softcap")?,
        dropout_rate: number(question, "dropout_rate")?.unwrap_or(0.0),
    };
    call.offsets = offsets(question, &call)?;
    check_numbers(&call)?;
    Ok(call)
}

/// Check the ranges of scale, softcap and dropout_rate, and the length of sinks (MHA-ARG-2).
fn check_numbers(call: &Call) -> Result<(), Refusal> {
    let in_float64 = call.query.dtype == "F64";
    let (least, most) =
        if in_float64 { (f64::MIN_POSITIVE, f64::MAX) } else { (f32::MIN_POSITIVE.into(), f32::MAX.into()) };
    check(call.scale.abs() <= most, "`scale` must be finite")?;
    check(call.softcap.map_or(true, |softcap| (least..=most).contains(&softcap)), "`softcap` must be above 0")?;
    check((0.0..1.0).contains(&call.dropout_rate), "`dropout_rate` must lie in [0, 1)")?;
    if call.dropout_rate > 0.0 && call.dropout_mask.is_none() {
        return Err(Refusal::Unsupported("dropout needs a `dropout_mask`".to_string()));
    }
    Ok(())
}

fn answer_to(question: &Question) -> Result<Outputs, Refusal> {
    if question.function != "attention" {
        return Err(Refusal::Unsupported(format!("this program has no function {}", question.function)));
    }
    let call = checked(question)?;
    let (output, lse) = attention(&call);
    let sizes = call.sizes;
    let array = |shape: Vec<usize>, numbers| Array {
        dtype: call.query.dtype.clone(),
        shape,
        elements: Elements::Floating(numbers),
    };
    Ok(vec![
        ("output", array(vec![sizes.batch, sizes.heads, sizes.q_len, sizes.v_dim], output)),
        ("lse", array(vec![sizes.batch, sizes.heads, sizes.q_len], lse)),
    ])
}

fn main() -> ExitCode {
    answer_questions(CLAIMS, answer_to)
}
