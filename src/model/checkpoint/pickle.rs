//! A pickle that holds tensors and nothing else.
//!
//! A pickle is a program, and Python runs what it says. Here it can build dictionaries, tuples and tensors
//! over storages. Whatever else it names is refused by that name, and nothing is ever called.

use std::collections::HashMap;

/// A tensor as the pickle describes it: a view of a storage, in elements.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct View<'a> {
    /// The storage's key: the entry `data/KEY` of the archive.
    pub storage: &'a str,
    /// The dtype as safetensors calls it.
    pub dtype: &'static str,
    /// Bytes of one element.
    pub element: usize,
    /// Elements in the storage.
    pub storage_len: usize,
    /// The first element.
    pub offset: usize,
    /// Length of each dimension.
    pub shape: Vec<usize>,
    /// Elements from one index to the next, in each dimension.
    pub stride: Vec<usize>,
}

/// Names and tensors of the dictionary in `pickle`, in its order.
///
/// # Errors
/// In words: an operation or a global that is not allowed, or what is wrong with the program.
pub fn tensors(pickle: &[u8]) -> Result<Vec<(&str, View<'_>)>, String> {
    let mut machine = Machine { code: pickle, ..Machine::default() };
    let top = machine.run()?;
    let Value::Dict(items) = &machine.values[top] else {
        return Err(format!("holds {}, expected a dictionary of tensors", machine.describe(top)));
    };
    let named = items.iter().map(|&(key, value)| {
        let Value::Text(name) = machine.values[key] else {
            return Err(format!("has a tensor called {}, expected a text", machine.describe(key)));
        };
        match &machine.values[value] {
            Value::Tensor(view) => Ok((name, View::clone(view))),
            _ => Err(format!("holds {} as `{name}`, expected a tensor", machine.describe(value))),
        }
    });
    named.collect()
}

/// More values than that no checkpoint has: a tensor takes about fifteen.
const MAX_VALUES: usize = 1 << 20;

/// As for safetensors.
const MAX_DIMS: usize = 8;

/// What a program is made of. Values refer to each other by index, so that sharing and cycles cost nothing.
#[derive(Debug)]
enum Value<'a> {
    None,
    Bool,
    Number(i64),
    Float,
    Text(&'a str),
    Tuple(Vec<usize>),
    List(Vec<usize>),
    Dict(Vec<(usize, usize)>),
    Global(Global),
    Storage(Storage<'a>),
    Tensor(Box<View<'a>>),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Storage<'a> {
    key: &'a str,
    dtype: &'static str,
    element: usize,
    len: usize,
}

/// Everything that a program may name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Global {
    OrderedDict,
    RebuildTensor,
    RebuildParameter,
    /// A kind of storage: its dtype and bytes of an element.
    Storage(&'static str, usize),
}

const GLOBALS: [(&str, &str, Global); 13] = [
    ("collections", "OrderedDict", Global::OrderedDict),
    ("torch._utils", "_rebuild_tensor_v2", Global::RebuildTensor),
    ("torch._utils", "_rebuild_parameter", Global::RebuildParameter),
    ("torch", "HalfStorage", Global::Storage("F16", 2)),
    ("torch", "BFloat16Storage", Global::Storage("BF16", 2)),
    ("torch", "FloatStorage", Global::Storage("F32", 4)),
    ("torch", "DoubleStorage", Global::Storage("F64", 8)),
    ("torch", "LongStorage", Global::Storage("I64", 8)),
    ("torch", "IntStorage", Global::Storage("I32", 4)),
    ("torch", "ShortStorage", Global::Storage("I16", 2)),
    ("torch", "CharStorage", Global::Storage("I8", 1)),
    ("torch", "ByteStorage", Global::Storage("U8", 1)),
    ("torch", "BoolStorage", Global::Storage("BOOL", 1)),
];

/// The program and what it has made so far.
#[derive(Default)]
struct Machine<'a> {
    code: &'a [u8],
    values: Vec<Value<'a>>,
    stack: Vec<usize>,
    /// Where the stack stood at each mark.
    marks: Vec<usize>,
    memo: HashMap<u32, usize>,
}

impl<'a> Machine<'a> {
    /// Runs to the end; the value that is left. The names of the operations are those of Python's `pickletools`.
    fn run(&mut self) -> Result<usize, String> {
        loop {
            let op = self.take(1)?[0];
            match op {
                b'.' => return self.pop(),                                                 // STOP
                0x80 => self.skip(1)?,                                                     // PROTO
                0x95 => self.skip(8)?,                                                     // FRAME
                b'(' => self.marks.push(self.stack.len()),                                 // MARK
                b'0' => self.pop().map(|_| ())?,                                           // POP
                b'1' => self.pop_mark().map(|_| ())?,                                      // POP_MARK
                b'N' => self.push(Value::None)?,                                           // NONE
                0x88 | 0x89 => self.push(Value::Bool)?, // NEWTRUE, NEWFALSE
                b'K' | b'M' | b'J' | 0x8a => self.number(op)?, // BININT1, BININT2, BININT, LONG1
                b'G' => self.skip(8).and_then(|()| self.push(Value::Float))?, // BINFLOAT
                b'X' | 0x8c => self.text(op)?,          // BINUNICODE, SHORT_BINUNICODE
                b')' => self.push(Value::Tuple(Vec::new()))?, // EMPTY_TUPLE
                b']' => self.push(Value::List(Vec::new()))?, // EMPTY_LIST
                b'}' => self.push(Value::Dict(Vec::new()))?, // EMPTY_DICT
                b't' => self.pop_mark().and_then(|items| self.push(Value::Tuple(items)))?, // TUPLE
                0x85..=0x87 => self.tuple(usize::from(op - 0x84))?, // TUPLE1, TUPLE2, TUPLE3
                b'a' | b'e' => self.append(op == b'e')?, // APPEND, APPENDS
                b's' | b'u' => self.set_items(op == b'u')?, // SETITEM, SETITEMS
                b'q' | b'r' | 0x94 => self.memoize(op)?, // BINPUT, LONG_BINPUT, MEMOIZE
                b'h' | b'j' => self.recall(op)?,        // BINGET, LONG_BINGET
                b'c' | 0x93 => self.global(op)?,        // GLOBAL, STACK_GLOBAL
                b'Q' => self.storage()?,                // BINPERSID
                b'R' => self.reduce()?,                 // REDUCE
                b'b' => self.build()?,                  // BUILD
                _ => {
                    return Err(format!(
                        "uses the pickle operation {:?} ({op:#04x}), which is not allowed",
                        char::from(op)
                    ));
                }
            }
        }
    }

    fn take(&mut self, length: usize) -> Result<&'a [u8], String> {
        let (taken, rest) =
            self.code.split_at_checked(length).ok_or("has a pickle that ends in the middle")?;
        self.code = rest;
        Ok(taken)
    }

    fn skip(&mut self, length: usize) -> Result<(), String> {
        self.take(length).map(|_| ())
    }

    /// A number of up to 8 bytes, lowest first.
    fn little_endian(&mut self, length: usize) -> Result<u64, String> {
        Ok(self.take(length)?.iter().rev().fold(0, |number, &byte| number << 8 | u64::from(byte)))
    }

    fn push(&mut self, value: Value<'a>) -> Result<(), String> {
        if self.values.len() >= MAX_VALUES {
            return Err(format!("has a pickle of more than {MAX_VALUES} values"));
        }
        self.stack.push(self.values.len());
        self.values.push(value);
        Ok(())
    }

    fn pop(&mut self) -> Result<usize, String> {
        let bottom = self.marks.last().copied().unwrap_or(0);
        if self.stack.len() <= bottom {
            return Err("has a pickle that takes from an empty stack".into());
        }
        Ok(self.stack.pop().expect("above the bottom"))
    }

    fn pop_mark(&mut self) -> Result<Vec<usize>, String> {
        let mark = self.marks.pop().ok_or("has a pickle that ends what it never began")?;
        Ok(self.stack.split_off(mark))
    }

    fn top(&self) -> Result<usize, String> {
        self.stack.last().copied().ok_or_else(|| "has a pickle that reads an empty stack".into())
    }

    fn number(&mut self, op: u8) -> Result<(), String> {
        let length = match op {
            b'K' => 1,
            b'M' => 2,
            b'J' => 4,
            _ => usize::from(self.take(1)?[0]),
        };
        if length > 8 {
            return Err(format!("holds a number of {length} bytes, expected at most 8"));
        }
        let number = self.little_endian(length)?;
        // BININT and LONG1 are signed.
        let unused = if matches!(op, b'K' | b'M') || length == 0 { 0 } else { 64 - 8 * length as u32 };
        self.push(Value::Number((number << unused) as i64 >> unused))
    }

    fn text(&mut self, op: u8) -> Result<(), String> {
        let length = self.little_endian(if op == b'X' { 4 } else { 1 })? as usize;
        let text = std::str::from_utf8(self.take(length)?).map_err(|_| "holds a text that is not UTF-8")?;
        self.push(Value::Text(text))
    }

    fn tuple(&mut self, length: usize) -> Result<(), String> {
        let mut items = (0..length).map(|_| self.pop()).collect::<Result<Vec<_>, _>>()?;
        items.reverse();
        self.push(Value::Tuple(items))
    }

    fn append(&mut self, many: bool) -> Result<(), String> {
        let items = if many { self.pop_mark()? } else { vec![self.pop()?] };
        let list = self.top()?;
        match &mut self.values[list] {
            Value::List(list) => list.extend(items),
            _ => return Err(format!("appends to {}", self.describe(list))),
        }
        Ok(())
    }

    fn set_items(&mut self, many: bool) -> Result<(), String> {
        let items = match many {
            true => self.pop_mark()?,
            false => {
                let value = self.pop()?;
                vec![self.pop()?, value]
            }
        };
        let (pairs, []) = items.as_chunks::<2>() else { return Err("sets a key without a value".into()) };
        let dict = self.top()?;
        match &mut self.values[dict] {
            Value::Dict(dict) => dict.extend(pairs.iter().map(|&[key, value]| (key, value))),
            _ => return Err(format!("sets items of {}", self.describe(dict))),
        }
        Ok(())
    }

    fn memoize(&mut self, op: u8) -> Result<(), String> {
        let key = match op {
            b'q' => self.little_endian(1)? as u32,
            b'r' => self.little_endian(4)? as u32,
            _ => self.memo.len() as u32,
        };
        self.memo.insert(key, self.top()?);
        Ok(())
    }

    fn recall(&mut self, op: u8) -> Result<(), String> {
        let key = self.little_endian(if op == b'h' { 1 } else { 4 })? as u32;
        let value = *self.memo.get(&key).ok_or("has a pickle that recalls what it never noted")?;
        if self.stack.len() >= MAX_VALUES {
            return Err(format!("has a pickle that stacks more than {MAX_VALUES} values"));
        }
        self.stack.push(value);
        Ok(())
    }

    fn global(&mut self, op: u8) -> Result<(), String> {
        let (module, name) = match op {
            b'c' => (self.line()?, self.line()?),
            _ => {
                let (name, module) = (self.pop()?, self.pop()?);
                match (&self.values[module], &self.values[name]) {
                    (Value::Text(module), Value::Text(name)) => (*module, *name),
                    _ => return Err("names a global by something that is no text".into()),
                }
            }
        };
        let allowed = GLOBALS.iter().find(|(m, n, _)| (*m, *n) == (module, name));
        let &(_, _, global) = allowed.ok_or_else(|| {
            format!(
                "names `{module}.{name}`, which is not allowed: only dictionaries of plain tensors are read"
            )
        })?;
        self.push(Value::Global(global))
    }

    fn line(&mut self) -> Result<&'a str, String> {
        let end =
            self.code.iter().position(|&byte| byte == b'\n').ok_or("has a pickle that ends in the middle")?;
        let line = &self.take(end + 1)?[..end];
        std::str::from_utf8(line).map_err(|_| "holds a name that is not UTF-8".into())
    }

    /// `('storage', kind, key, device, elements)`: what torch has in place of the bytes.
    fn storage(&mut self) -> Result<(), String> {
        let id = self.pop()?;
        let parts = match &self.values[id] {
            Value::Tuple(parts) => parts.iter().map(|&part| &self.values[part]).collect(),
            _ => Vec::new(),
        };
        let &[
            Value::Text("storage"),
            &Value::Global(Global::Storage(dtype, element)),
            Value::Text(key),
            Value::Text(_),
            &Value::Number(len),
        ] = parts.as_slice()
        else {
            return Err("refers to something outside that is not a tensor's storage".into());
        };
        let len = usize::try_from(len).map_err(|_| format!("has a storage `{key}` of {len} elements"))?;
        self.push(Value::Storage(Storage { key, dtype, element, len }))
    }

    /// Calls a global: one of three, each of which only describes.
    fn reduce(&mut self) -> Result<(), String> {
        let (arguments, function) = (self.pop()?, self.pop()?);
        let Value::Tuple(arguments) = &self.values[arguments] else {
            return Err(format!("calls something with {}", self.describe(arguments)));
        };
        let argument = |i: usize| arguments.get(i).map(|&argument| &self.values[argument]);
        match (&self.values[function], argument(0), arguments.len()) {
            (Value::Global(Global::OrderedDict), None, 0) => self.push(Value::Dict(Vec::new())),
            (Value::Global(Global::RebuildTensor), Some(&Value::Storage(storage)), 6 | 7) => {
                let numbers = |i: usize| self.numbers(arguments[i]);
                let (offset, shape, stride) = (self.index(arguments[1]), numbers(2), numbers(3));
                let (Some(offset), Some(shape), Some(stride)) = (offset, shape, stride) else {
                    return Err("describes a tensor by something else than numbers".into());
                };
                let view = View {
                    storage: storage.key,
                    dtype: storage.dtype,
                    element: storage.element,
                    storage_len: storage.len,
                    offset,
                    shape,
                    stride,
                };
                if view.shape.len() != view.stride.len() {
                    return Err(format!(
                        "has a tensor of shape {:?} and strides {:?}",
                        view.shape, view.stride
                    ));
                }
                self.push(Value::Tensor(Box::new(view)))
            }
            (Value::Global(Global::RebuildParameter), Some(Value::Tensor(view)), 3) => {
                let view = view.clone();
                self.push(Value::Tensor(view))
            }
            _ => Err(format!(
                "calls {} with {} arguments of another kind",
                self.describe(function),
                arguments.len()
            )),
        }
    }

    /// A number that is not negative.
    fn index(&self, value: usize) -> Option<usize> {
        match self.values[value] {
            Value::Number(number) => usize::try_from(number).ok(),
            _ => None,
        }
    }

    /// A tuple of at most [`MAX_DIMS`] numbers that are not negative.
    fn numbers(&self, value: usize) -> Option<Vec<usize>> {
        match &self.values[value] {
            Value::Tuple(items) if items.len() <= MAX_DIMS => {
                items.iter().map(|&item| self.index(item)).collect()
            }
            _ => None,
        }
    }

    /// Attributes: a state dict has `_metadata`, which says nothing about tensors.
    fn build(&mut self) -> Result<(), String> {
        self.pop()?;
        let object = self.top()?;
        match self.values[object] {
            Value::Dict(_) => Ok(()),
            _ => Err(format!("sets attributes of {}", self.describe(object))),
        }
    }

    fn describe(&self, value: usize) -> String {
        match &self.values[value] {
            Value::None => "None".into(),
            Value::Bool => "a truth value".into(),
            Value::Number(number) => format!("the number {number}"),
            Value::Float => "a fraction".into(),
            Value::Text(text) => format!("the text {:?}", text.chars().take(40).collect::<String>()),
            Value::Tuple(_) => "a tuple".into(),
            Value::List(_) => "a list".into(),
            Value::Dict(_) => "a dictionary".into(),
            Value::Global(Global::Storage(dtype, _)) => format!("a kind of storage ({dtype})"),
            Value::Global(global) => format!("{global:?}"),
            Value::Storage(_) => "a storage".into(),
            Value::Tensor(_) => "a tensor".into(),
        }
    }
}
