//! A reader and writer of the protocol that docs/protocol.md describes, with the standard library alone.

use std::collections::HashMap;
use std::io::{self, BufRead, Write};
use std::process::ExitCode;
use std::time::Instant;

const PROTOCOL: &str = "mha-spec-protocol/1";

/// The elements of an array; f64 holds every float32 and float64, and i128 every integer.
pub enum Elements {
    Floating(Vec<f64>),
    Integers(Vec<i128>),
}

/// An array, whose dtype has the name that safetensors gives it, as in `F32`.
pub struct Array {
    pub dtype: String,
    pub shape: Vec<usize>,
    pub elements: Elements,
}

impl Array {
    pub fn is_floating(&self) -> bool {
        matches!(self.elements, Elements::Floating(_))
    }

    /// Tell whether the elements are integers, and not booleans.
    pub fn is_integer(&self) -> bool {
        self.dtype.starts_with(&['I', 'U'][..])
    }

    /// Give the elements of a floating array; nothing for an array of integers.
    pub fn numbers(&self) -> &[f64] {
        match &self.elements {
            Elements::Floating(numbers) => numbers,
            Elements::Integers(_) => &[],
        }
    }

    /// Give the elements of an array of integers or booleans; nothing for a floating array.
    pub fn integers(&self) -> &[i128] {
        match &self.elements {
            Elements::Floating(_) => &[],
            Elements::Integers(integers) => integers,
        }
    }
}

/// A question: the function, its arrays by name, its options without those that are null, and the outputs to give.
pub struct Question {
    pub function: String,
    pub arrays: HashMap<String, Array>,
    pub options: HashMap<String, Json>,
    pub outputs: Vec<String>,
}

/// The results of a call by name.
pub type Outputs = Vec<(&'static str, Array)>;

/// The reason why there is no result.
pub enum Refusal {
    Unsupported(String),
    Raised(String),
    Lost(String),
}

/// Reply to `hello` with the claims, then answer every question until the runner closes the standard input. A line that
/// is not a message ends the program with the exit status 1.
pub fn answer_questions<F>(claims: &str, answer_to: F) -> ExitCode
where
    F: Fn(&Question) -> Result<Outputs, Refusal>,
{
    for line in io::stdin().lock().lines() {
        match line.ok().and_then(|line| reply(&line, claims, &answer_to)) {
            Some(reply) if print(&reply).is_ok() => continue,
            Some(_) => eprintln!("the standard output is closed"),
            None => eprintln!("standard input has a line that is not a message of {PROTOCOL}"),
        }
        return ExitCode::FAILURE;
    }
    ExitCode::SUCCESS
}

fn print(reply: &str) -> io::Result<()> {
    let mut output = io::stdout().lock();
    writeln!(output, "{reply}")?;
    output.flush()
}

/// Give the reply to a line; None if the line is not a message.
fn reply<F>(line: &str, claims: &str, answer_to: &F) -> Option<String>
where
    F: Fn(&Question) -> Result<Outputs, Refusal>,
{
    let message = parse(line.as_bytes())?;
    match message.text("message")? {
        "question" => answer(&message, answer_to),
        "hello" if message.text("protocol") == Some(PROTOCOL) => Some(claims.to_string()),
        "hello" => Some(format!(r#"{{"message": "refusal", "reason": "this program speaks {PROTOCOL}"}}"#)),
        _ => None,
    }
}

fn answer<F>(message: &Json, answer_to: &F) -> Option<String>
where
    F: Fn(&Question) -> Result<Outputs, Refusal>,
{
    let (number, path) = (message.get("number")?.count()?, message.text("answer")?);
    let mut seconds = 0.0;
    let result = question(message)?.and_then(|question| {
        let start = Instant::now();
        let outputs = answer_to(&question);
        seconds = start.elapsed().as_secs_f64();
        let asked: Vec<_> =
            outputs?.into_iter().filter(|(name, _)| question.outputs.iter().any(|n| n == name)).collect();
        std::fs::write(path, safetensors(&asked))
            .map_err(|error| Refusal::Raised(format!("{path} cannot be written: {error}")))
    });
    let (kind, reason) = match result {
        Ok(()) => ("returned", None),
        Err(Refusal::Unsupported(reason)) => ("unsupported", Some(reason)),
        Err(Refusal::Raised(reason)) => ("raised", Some(reason)),
        Err(Refusal::Lost(reason)) => ("lost", Some(reason)),
    };
    let reason = reason.map_or(String::new(), |text| format!(r#", "reason": {}"#, quoted(&text)));
    Some(format!(r#"{{"message": "answer", "number": {number}, "kind": "{kind}", "seconds": {seconds:.9}{reason}}}"#))
}

/// Read a question; None if the message lacks a member, and a refusal if its file cannot be read.
fn question(message: &Json) -> Option<Result<Question, Refusal>> {
    let path = message.text("arrays")?;
    let outputs = message.get("outputs")?.list()?.iter().filter_map(Json::as_text).map(str::to_string).collect();
    let options = match message.get("options")? {
        Json::Object(members) => members.iter().filter(|(_, value)| !matches!(value, Json::Null)).cloned().collect(),
        _ => return None,
    };
    let function = message.text("function")?.to_string();
    let arrays = std::fs::read(path).map_err(|error| lost(&error.to_string())).and_then(|bytes| read_arrays(&bytes));
    Some(arrays.map(|arrays| Question { function, arrays, options, outputs }))
}

// ---- Safetensors ----

fn lost(reason: &str) -> Refusal {
    Refusal::Lost(format!("the file `arrays` cannot be read: {reason}"))
}

fn read_arrays(bytes: &[u8]) -> Result<HashMap<String, Array>, Refusal> {
    let (members, content) = read_header(bytes).ok_or_else(|| lost("it has no header"))?;
    let arrays = members.into_iter().filter(|(name, _)| name != "__metadata__");
    arrays.map(|(name, entry)| Ok((name, read_array(&entry, content)?))).collect()
}

/// Give the members of the header, and the bytes that follow it.
fn read_header(bytes: &[u8]) -> Option<(Members, &[u8])> {
    let length = usize::try_from(u64::from_le_bytes(bytes.get(..8)?.try_into().ok()?)).ok()?;
    let end = length.checked_add(8)?;
    match parse(bytes.get(8..end)?)? {
        Json::Object(members) => Some((members, &bytes[end..])),
        _ => None,
    }
}

fn read_array(entry: &Json, content: &[u8]) -> Result<Array, Refusal> {
    let (dtype, shape, bytes) = read_entry(entry, content).ok_or_else(|| lost("an entry of the header is wrong"))?;
    let unsupported = || Refusal::Unsupported(format!("arrays of {dtype} are not supported"));
    let elements = read_elements(dtype, bytes).ok_or_else(unsupported)?;
    let array = Array { dtype: dtype.to_string(), shape, elements };
    let count = array.shape.iter().try_fold(1usize, |product, length| product.checked_mul(*length));
    if count == Some(array.numbers().len() + array.integers().len()) {
        Ok(array)
    } else {
        Err(lost("an array has a wrong length"))
    }
}

/// Give the dtype, the shape and the bytes of an array.
fn read_entry<'a>(entry: &'a Json, content: &'a [u8]) -> Option<(&'a str, Vec<usize>, &'a [u8])> {
    let counts = |name| -> Option<Vec<usize>> { entry.get(name)?.list()?.iter().map(Json::count).collect() };
    match counts("data_offsets")?[..] {
        [begin, end] => Some((entry.text("dtype")?, counts("shape")?, content.get(begin..end)?)),
        _ => None,
    }
}

/// Give the elements; None if the program does not read the dtype.
fn read_elements(dtype: &str, bytes: &[u8]) -> Option<Elements> {
    let floating = |size, read: fn(&[u8]) -> f64| Elements::Floating(bytes.chunks_exact(size).map(read).collect());
    let integers = |size, read: fn(&[u8]) -> i128| Elements::Integers(bytes.chunks_exact(size).map(read).collect());
    Some(match dtype {
        "F64" => floating(8, |b| f64::from_le_bytes(b.try_into().unwrap())),
        "F32" => floating(4, |b| f32::from_le_bytes(b.try_into().unwrap()).into()),
        "BOOL" | "U8" => integers(1, |b| b[0].into()),
        "I8" => integers(1, |b| (b[0] as i8).into()),
        "U16" => integers(2, |b| u16::from_le_bytes(b.try_into().unwrap()).into()),
        "I16" => integers(2, |b| i16::from_le_bytes(b.try_into().unwrap()).into()),
        "U32" => integers(4, |b| u32::from_le_bytes(b.try_into().unwrap()).into()),
        "I32" => integers(4, |b| i32::from_le_bytes(b.try_into().unwrap()).into()),
        "U64" => integers(8, |b| u64::from_le_bytes(b.try_into().unwrap()).into()),
        "I64" => integers(8, |b| i64::from_le_bytes(b.try_into().unwrap()).into()),
        _ => return None,
    })
}

fn safetensors(arrays: &[(&str, Array)]) -> Vec<u8> {
    let mut content = Vec::new();
    let mut entries = Vec::new();
    for (name, array) in arrays {
        let begin = content.len();
        for number in array.numbers() {
            match array.dtype.as_str() {
                "F64" => content.extend(number.to_le_bytes()),
                _ => content.extend((*number as f32).to_le_bytes()),
            }
        }
        let (dtype, shape, end) = (&array.dtype, &array.shape, content.len());
        entries.push(format!(r#""{name}":{{"dtype":"{dtype}","shape":{shape:?},"data_offsets":[{begin},{end}]}}"#));
    }
    let header = format!("{{{}}}", entries.join(","));
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend(header.into_bytes());
    bytes.extend(content);
    bytes
}

// ---- JSON ----

#[derive(Clone)]
pub enum Json {
    Null,
    Bool(bool),
    Number(f64),
    Text(String),
    List(Vec<Json>),
    Object(Members),
}

type Members = Vec<(String, Json)>;

impl Json {
    pub fn get(&self, key: &str) -> Option<&Json> {
        match self {
            Json::Object(members) => members.iter().find(|(name, _)| name == key).map(|(_, value)| value),
            _ => None,
        }
    }

    pub fn text(&self, key: &str) -> Option<&str> {
        self.get(key)?.as_text()
    }

    pub fn as_text(&self) -> Option<&str> {
        match self {
            Json::Text(text) => Some(text),
            _ => None,
        }
    }

    pub fn list(&self) -> Option<&[Json]> {
        match self {
            Json::List(values) => Some(values),
            _ => None,
        }
    }

    /// Give a number; JSON has no NaN and no infinities, which are written {"number": "nan"}.
    pub fn number(&self) -> Option<f64> {
        match self {
            Json::Number(number) => Some(*number),
            _ => self.text("number")?.parse().ok(),
        }
    }

    /// Give an integer that is not negative.
    fn count(&self) -> Option<usize> {
        self.number().filter(|x| (0.0..9e15).contains(x) && x.fract() == 0.0).map(|x| x as usize)
    }
}

fn quoted(text: &str) -> String {
    let escaped = text.chars().map(|symbol| match symbol {
        '"' | '\\' | '\0'..='\x1f' => format!("\\u{:04x}", symbol as u32),
        _ => symbol.to_string(),
    });
    format!("\"{}\"", escaped.collect::<String>())
}

const MOST_DEPTH: usize = 32;

fn parse(text: &[u8]) -> Option<Json> {
    let mut reader = Reader { text, at: 0, depth: 0 };
    let value = reader.value()?;
    reader.skip_space();
    (reader.at == text.len()).then_some(value)
}

struct Reader<'a> {
    text: &'a [u8],
    at: usize,
    depth: usize,
}

impl Reader<'_> {
    fn peek(&self) -> Option<u8> {
        self.text.get(self.at).copied()
    }

    fn skip_space(&mut self) {
        while matches!(self.peek(), Some(b' ' | b'\t' | b'\r' | b'\n')) {
            self.at += 1;
        }
    }

    fn skip(&mut self, symbol: u8) -> Option<()> {
        self.skip_space();
        (self.peek()? == symbol).then(|| self.at += 1)
    }

    fn word(&mut self, word: &str, value: Json) -> Option<Json> {
        self.text[self.at..].starts_with(word.as_bytes()).then(|| self.at += word.len())?;
        Some(value)
    }

    fn value(&mut self) -> Option<Json> {
        self.skip_space();
        self.depth += 1;
        let value = match self.peek()? {
            _ if self.depth > MOST_DEPTH => None,
            b'n' => self.word("null", Json::Null),
            b't' => self.word("true", Json::Bool(true)),
            b'f' => self.word("false", Json::Bool(false)),
            b'"' => self.string().map(Json::Text),
            b'[' => self.members(b'[', b']', Self::value).map(Json::List),
            b'{' => self.members(b'{', b'}', Self::member).map(Json::Object),
            _ => self.number(),
        };
        self.depth -= 1;
        value
    }

    fn members<T>(&mut self, opening: u8, closing: u8, member: fn(&mut Self) -> Option<T>) -> Option<Vec<T>> {
        let mut members = Vec::new();
        self.skip(opening)?;
        if self.skip(closing).is_some() {
            return Some(members);
        }
        loop {
            members.push(member(self)?);
            if self.skip(b',').is_none() {
                return self.skip(closing).map(|_| members);
            }
        }
    }

    fn member(&mut self) -> Option<(String, Json)> {
        self.skip_space();
        let key = self.string()?;
        self.skip(b':')?;
        Some((key, self.value()?))
    }

    fn number(&mut self) -> Option<Json> {
        let length = self.text[self.at..].iter().take_while(|b| b"+-.eE0123456789".contains(b)).count();
        let digits = std::str::from_utf8(&self.text[self.at..self.at + length]).ok()?;
        self.at += length;
        digits.parse().ok().map(Json::Number)
    }

    fn string(&mut self) -> Option<String> {
        let mut bytes = Vec::new();
        self.skip(b'"')?;
        loop {
            let symbol = self.peek()?;
            self.at += 1;
            match symbol {
                b'"' => return String::from_utf8(bytes).ok(),
                b'\\' => bytes.extend(self.escape()?.to_string().bytes()),
                _ => bytes.push(symbol),
            }
        }
    }

    fn escape(&mut self) -> Option<char> {
        let symbol = self.peek()?;
        self.at += 1;
        Some(match symbol {
            b'u' => return self.unicode(),
            b'b' => '\x08',
            b'f' => '\x0c',
            b'n' => '\n',
            b'r' => '\r',
            b't' => '\t',
            b'"' | b'\\' | b'/' => symbol.into(),
            _ => return None,
        })
    }

    /// Read four hexadecimal digits, and if they are the first half of a pair, the second half.
    fn unicode(&mut self) -> Option<char> {
        let mut units = vec![self.unit()?];
        if (0xD800..0xDC00).contains(&units[0]) {
            self.word("\\u", Json::Null)?;
            units.push(self.unit()?);
        }
        char::decode_utf16(units).next()?.ok()
    }

    fn unit(&mut self) -> Option<u16> {
        let digits = std::str::from_utf8(self.text.get(self.at..self.at + 4)?).ok()?;
        self.at += 4;
        u16::from_str_radix(digits, 16).ok()
    }
}
