//! A YAML document with the place of every value, and a cursor that reads typed values from it.

use super::limits::{Limits, yaml_options};
use super::{Position, ResourceError};
use crate::cut::{cut, cut_to};
use serde::de::{self, Deserialize, Deserializer, MapAccess, SeqAccess, Visitor};
use serde_saphyr::Spanned;
use std::collections::BTreeMap;
use std::fmt;
use std::ops::RangeInclusive;

/// Where a document comes from.
#[derive(Clone, Copy, Debug)]
pub struct Source<'a> {
    /// The file, as errors show it.
    pub file: &'a str,
    /// Lines of the file that stand before the document.
    pub lines_before: u64,
}

impl Source<'_> {
    /// An error about a document that cannot be read at all.
    pub fn syntax(self, at: (u64, u64), object: String, message: String) -> ResourceError {
        ResourceError::Syntax { at: self.position(at), object, message: cut_to(&message, MESSAGE).into_owned() }
    }

    /// A place in the file, from one in the document.
    pub fn position(self, (line, column): (u64, u64)) -> Position {
        let line = if line == 0 { 0 } else { self.lines_before + line };
        Position { file: self.file.to_owned(), line, column }
    }
}

/// As many characters of the parser's message are shown; it may echo input.
const MESSAGE: usize = 300;

/// Reads a document (YAML 1.2, of which JSON is a part), or says where it stops being one and why.
pub fn documents(source: Source<'_>, text: &str) -> Result<Vec<Tree>, ((u64, u64), String)> {
    let limits = Limits::of(text);
    // In YAML 1.2 `yes`, `no`, `on`, `y` are strings.
    let mut options = yaml_options(text);
    options.strict_booleans = true;
    let trees: Result<Vec<Spanned<Tree>>, _> = serde_saphyr::from_multiple_with_options(text, options);
    match trees {
        Ok(trees) => Ok(trees.into_iter().map(Tree::placed).collect()),
        Err(error) => {
            let (line, column) = error.location().map_or((0, 0), |at| (at.line(), at.column()));
            let message = limits.explain(&error).unwrap_or_else(|| {
                let place = format!(" at line {line}, column {column}");
                renumber(&error.to_string().replace(&place, ""), source.lines_before)
            });
            Err(((line, column), message))
        }
    }
}

/// Reads one JSON document, without places; `None` if it is none.
pub fn json(text: &str) -> Option<Tree> {
    serde_json::from_str::<serde_json::Value>(text).ok().map(Tree::unplaced)
}

/// A value and where it stands.
#[derive(Debug)]
pub struct Tree {
    value: Value,
    line: u64,
    column: u64,
}

#[derive(Debug)]
enum Value {
    Null,
    Bool(bool),
    Integer(i128),
    Float(f64),
    String(String),
    List(Vec<Tree>),
    Map(Vec<(Key, Tree)>),
}

#[derive(Debug)]
struct Key {
    name: String,
    line: u64,
    column: u64,
}

impl Tree {
    fn placed(spanned: Spanned<Tree>) -> Tree {
        let at = spanned.referenced;
        Tree { value: spanned.value.value, line: at.line(), column: at.column() }
    }

    fn unplaced(json: serde_json::Value) -> Tree {
        let value = match json {
            serde_json::Value::Null => Value::Null,
            serde_json::Value::Bool(value) => Value::Bool(value),
            serde_json::Value::Number(number) => match number.as_i128() {
                Some(integer) => Value::Integer(integer),
                None => Value::Float(number.as_f64().unwrap_or(f64::NAN)),
            },
            serde_json::Value::String(text) => Value::String(text),
            serde_json::Value::Array(items) => Value::List(items.into_iter().map(Tree::unplaced).collect()),
            serde_json::Value::Object(fields) => {
                let field = |(name, value)| (Key { name, line: 0, column: 0 }, Tree::unplaced(value));
                Value::Map(fields.into_iter().map(field).collect())
            }
        };
        Tree { value, line: 0, column: 0 }
    }

    /// A cursor on the whole document.
    pub fn cursor<'a>(&'a self, source: Source<'a>) -> Cursor<'a> {
        Cursor { source, tree: self, path: String::new() }
    }
}

/// A place in a document: the value, and how one gets there from the root.
#[derive(Clone, Debug)]
pub struct Cursor<'a> {
    source: Source<'a>,
    tree: &'a Tree,
    path: String,
}

impl<'a> Cursor<'a> {
    /// An error about this value.
    pub fn error(&self, problem: impl Into<String>, hint: impl Into<String>) -> ResourceError {
        error_at(self.source, (self.tree.line, self.tree.column), self.path.clone(), problem.into(), hint.into())
    }

    /// Where this value begins.
    pub fn place(&self) -> Position {
        self.source.position((self.tree.line, self.tree.column))
    }

    /// An error: this value names a kind that other programs read.
    pub fn foreign_kind(&self, kind: String) -> ResourceError {
        ResourceError::Kind { at: self.place(), kind }
    }

    /// The value as a mapping in which no field stands beside `known`.
    pub fn object(&self, known: &[&str]) -> Result<Object<'a>, ResourceError> {
        let Value::Map(entries) = &self.tree.value else { return Err(self.wrong_type("a mapping of fields")) };
        for (key, _) in entries {
            if !known.contains(&key.name.as_str()) {
                let hint = match nearest(&key.name, known) {
                    Some(name) => format!("did you mean `{name}`? Otherwise remove it"),
                    None => "remove it or correct its spelling or indentation".to_string(),
                };
                let path = join(&self.path, &key.name);
                return Err(error_at(self.source, (key.line, key.column), path, "unknown field".into(), hint));
            }
        }
        Ok(Object { cursor: self.clone(), entries })
    }

    /// The value as a mapping, whatever stands in it.
    pub fn any_object(&self) -> Result<Object<'a>, ResourceError> {
        let Value::Map(entries) = &self.tree.value else { return Err(self.wrong_type("a mapping of fields")) };
        Ok(Object { cursor: self.clone(), entries })
    }

    /// The elements of a list.
    pub fn list(&self) -> Result<Vec<Cursor<'a>>, ResourceError> {
        let Value::List(items) = &self.tree.value else { return Err(self.wrong_type("a list")) };
        let at = |(i, tree)| Cursor { source: self.source, tree, path: format!("{}[{i}]", self.path) };
        Ok(items.iter().enumerate().map(at).collect())
    }

    /// A string.
    pub fn string(&self) -> Result<&'a str, ResourceError> {
        match &self.tree.value {
            Value::String(text) => Ok(text),
            _ => Err(self.wrong_type("a string")),
        }
    }

    /// A string that `check` accepts.
    pub fn checked<T>(&self, check: impl Fn(&str) -> Result<T, &'static str>) -> Result<&'a str, ResourceError> {
        let text = self.string()?;
        check(text).map_err(|why| self.refused(text, why))?;
        Ok(text)
    }

    /// A string that `parse` understands.
    pub fn parsed<T>(&self, parse: impl Fn(&str) -> Result<T, &'static str>) -> Result<T, ResourceError> {
        let text = self.string()?;
        parse(text).map_err(|why| self.refused(text, why))
    }

    /// A port number, 1 to 65535.
    pub fn port(&self) -> Result<u16, ResourceError> {
        match &self.tree.value {
            Value::Integer(number) => u16::try_from(*number)
                .ok()
                .filter(|port| *port != 0)
                .ok_or_else(|| self.error(format!("{number} is not a port"), "use 1 to 65535")),
            _ => Err(self.wrong_type("a port number from 1 to 65535")),
        }
    }

    /// A whole number in `range`.
    pub fn integer(&self, range: RangeInclusive<i64>) -> Result<i64, ResourceError> {
        let (least, most) = (range.start(), range.end());
        match &self.tree.value {
            Value::Integer(number) => i64::try_from(*number)
                .ok()
                .filter(|number| range.contains(number))
                .ok_or_else(|| self.error(format!("{number} is out of range"), format!("use {least} to {most}"))),
            _ => Err(self.wrong_type(&format!("a number from {least} to {most}"))),
        }
    }

    /// Whether the value is the number 0, which the API's clients write for what is not given.
    pub fn is_zero(&self) -> bool {
        matches!(self.tree.value, Value::Integer(0))
    }

    /// Whether the value is a string (and not a number).
    pub fn is_string(&self) -> bool {
        matches!(self.tree.value, Value::String(_))
    }

    /// `true` or `false`.
    pub fn bool(&self) -> Result<bool, ResourceError> {
        match self.tree.value {
            Value::Bool(value) => Ok(value),
            _ => Err(self.wrong_type("true or false")),
        }
    }

    /// A list of strings.
    pub fn strings(&self) -> Result<Vec<String>, ResourceError> {
        self.list()?.iter().map(|item| Ok(item.string()?.to_string())).collect()
    }

    /// A mapping of strings to strings. `check` sees each key and value.
    pub fn string_map(
        &self,
        key: fn(&str) -> Result<(), &'static str>,
        value: fn(&str) -> Result<(), &'static str>,
    ) -> Result<BTreeMap<String, String>, ResourceError> {
        let Value::Map(entries) = &self.tree.value else { return Err(self.wrong_type("a mapping of strings")) };
        let mut out = BTreeMap::new();
        for (name, tree) in entries {
            let item = Cursor { source: self.source, tree, path: join(&self.path, &name.name) };
            key(&name.name).map_err(|why| {
                let (problem, hint) = split_reason(&name.name, why);
                error_at(self.source, (name.line, name.column), item.path.clone(), problem, hint)
            })?;
            out.insert(name.name.clone(), item.checked(value)?.to_string());
        }
        Ok(out)
    }

    /// What of a mapping of strings to strings both checks accept.
    pub fn readable_strings(
        &self,
        key: fn(&str) -> Result<(), &'static str>,
        value: fn(&str) -> Result<(), &'static str>,
    ) -> BTreeMap<String, String> {
        let Value::Map(entries) = &self.tree.value else { return BTreeMap::new() };
        let good = entries.iter().filter_map(|(name, tree)| match &tree.value {
            Value::String(text) if key(&name.name).is_ok() && value(text).is_ok() => {
                Some((name.name.clone(), text.clone()))
            }
            _ => None,
        });
        good.collect()
    }

    fn refused(&self, text: &str, why: &str) -> ResourceError {
        let (problem, hint) = split_reason(text, why);
        self.error(problem, hint)
    }

    fn wrong_type(&self, wanted: &str) -> ResourceError {
        let (found, hint) = match &self.tree.value {
            Value::Null => ("nothing", "fill it in or remove the field".to_string()),
            Value::Bool(value) => ("true or false", format!("for a string, write \"{value}\" in quotes")),
            Value::Integer(value) => ("a number", format!("for a string, write \"{value}\" in quotes")),
            Value::Float(value) => ("a number", format!("for a string, write \"{value}\" in quotes")),
            Value::String(_) => ("a string", "correct the value; a number stands without quotes".to_string()),
            Value::List(_) => ("a list", "remove the '-'".to_string()),
            Value::Map(_) => ("a mapping", "correct the value or its indentation".to_string()),
        };
        self.error(format!("expected {wanted}, found {found}"), hint)
    }
}

/// A mapping whose fields are known.
pub struct Object<'a> {
    cursor: Cursor<'a>,
    entries: &'a [(Key, Tree)],
}

impl<'a> Object<'a> {
    /// The field's value; a field that is null counts as absent, as the API server has it.
    pub fn get(&self, name: &str) -> Option<Cursor<'a>> {
        let (_, tree) = self.entries.iter().find(|(key, _)| key.name == name)?;
        if matches!(tree.value, Value::Null) {
            return None;
        }
        Some(Cursor { source: self.cursor.source, tree, path: join(&self.cursor.path, name) })
    }

    /// The field's value, or an error that it is missing.
    pub fn required(&self, name: &str) -> Result<Cursor<'a>, ResourceError> {
        self.get(name).ok_or_else(|| {
            let at = (self.cursor.tree.line, self.cursor.tree.column);
            let path = join(&self.cursor.path, name);
            error_at(self.cursor.source, at, path, "is missing".into(), format!("add `{name}`"))
        })
    }

    /// The elements of a list that may be absent.
    pub fn items(&self, name: &str) -> Result<Vec<Cursor<'a>>, ResourceError> {
        self.get(name).map_or(Ok(Vec::new()), |list| list.list())
    }

    /// A list of strings that may be absent.
    pub fn strings(&self, name: &str) -> Result<Vec<String>, ResourceError> {
        self.get(name).map_or(Ok(Vec::new()), |list| list.strings())
    }

    /// A string that may be absent.
    pub fn string(&self, name: &str) -> Result<Option<String>, ResourceError> {
        self.get(name).map(|value| value.string().map(str::to_string)).transpose()
    }
}

fn error_at(source: Source<'_>, at: (u64, u64), field: String, problem: String, hint: String) -> ResourceError {
    let field = if field.is_empty() { "document".to_string() } else { field };
    ResourceError::Field { at: source.position(at), object: Box::default(), field: field.into(), problem, hint }
}

/// `"is not a name: use ..."` about `text` as a problem and a hint.
fn split_reason(text: &str, why: &str) -> (String, String) {
    let (problem, hint) = why.split_once(": ").unwrap_or((why, "correct it"));
    (format!("\"{}\" {problem}", cut(text)), hint.to_string())
}

fn join(path: &str, name: &str) -> String {
    let name = cut(name);
    if path.is_empty() {
        name.into_owned()
    } else if name.contains(['.', '/']) {
        format!("{path}[{name}]")
    } else {
        format!("{path}.{name}")
    }
}

/// Adds to every line that a message names the lines that stand before the document.
fn renumber(message: &str, lines_before: u64) -> String {
    let mut parts = message.split("line ");
    let mut out = parts.next().unwrap_or_default().to_owned();
    for part in parts {
        let digits = part.bytes().take_while(u8::is_ascii_digit).count();
        out.push_str("line ");
        match part[..digits].parse::<u64>() {
            Ok(line) => out.push_str(&(lines_before + line).to_string()),
            Err(_) => out.push_str(&part[..digits]),
        }
        out.push_str(&part[digits..]);
    }
    out
}

/// The known name that `name` was probably meant to be.
fn nearest<'k>(name: &str, known: &[&'k str]) -> Option<&'k str> {
    let near = known.iter().filter(|known| is_nearly(name, known, 1 + name.len() / 4));
    near.copied().min_by_key(|known| edits(&name.to_lowercase(), &known.to_lowercase()))
}

/// Whether two names differ in no more than so many letters, whatever their case.
pub fn is_nearly(name: &str, known: &str, letters: usize) -> bool {
    // What is much longer is another name, and would take long to compare.
    name.len() <= 2 * known.len() && edits(&name.to_lowercase(), &known.to_lowercase()) <= letters
}

/// Least number of letters to insert, remove or replace (Levenshtein).
fn edits(a: &str, b: &str) -> usize {
    let mut row: Vec<usize> = (0..=b.chars().count()).collect();
    for (i, x) in a.chars().enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        for (j, y) in b.chars().enumerate() {
            let replaced = diagonal + usize::from(x != y);
            diagonal = row[j + 1];
            row[j + 1] = replaced.min(row[j] + 1).min(diagonal + 1);
        }
    }
    row[row.len() - 1]
}

impl<'de> Deserialize<'de> for Tree {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Tree, D::Error> {
        // The place is filled in by `placed`, from the `Spanned` around every value.
        deserializer.deserialize_any(ValueVisitor).map(|value| Tree { value, line: 0, column: 0 })
    }
}

struct ValueVisitor;

impl<'de> Visitor<'de> for ValueVisitor {
    type Value = Value;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a YAML value")
    }
    fn visit_unit<E: de::Error>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }
    fn visit_none<E: de::Error>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }
    fn visit_some<D: Deserializer<'de>>(self, deserializer: D) -> Result<Value, D::Error> {
        deserializer.deserialize_any(self)
    }
    fn visit_bool<E: de::Error>(self, value: bool) -> Result<Value, E> {
        Ok(Value::Bool(value))
    }
    fn visit_i64<E: de::Error>(self, value: i64) -> Result<Value, E> {
        Ok(Value::Integer(value.into()))
    }
    fn visit_u64<E: de::Error>(self, value: u64) -> Result<Value, E> {
        Ok(Value::Integer(value.into()))
    }
    fn visit_i128<E: de::Error>(self, value: i128) -> Result<Value, E> {
        Ok(Value::Integer(value))
    }
    fn visit_u128<E: de::Error>(self, value: u128) -> Result<Value, E> {
        Ok(i128::try_from(value).map_or(Value::Float(value as f64), Value::Integer))
    }
    fn visit_f64<E: de::Error>(self, value: f64) -> Result<Value, E> {
        Ok(Value::Float(value))
    }
    fn visit_str<E: de::Error>(self, value: &str) -> Result<Value, E> {
        Ok(Value::String(value.to_string()))
    }
    fn visit_string<E: de::Error>(self, value: String) -> Result<Value, E> {
        Ok(Value::String(value))
    }
    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Value, A::Error> {
        let mut items = Vec::new();
        while let Some(item) = seq.next_element::<Spanned<Tree>>()? {
            items.push(Tree::placed(item));
        }
        Ok(Value::List(items))
    }
    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Value, A::Error> {
        let mut entries = Vec::new();
        while let Some((key, value)) = map.next_entry::<Spanned<String>, Spanned<Tree>>()? {
            let at = key.referenced;
            let key = Key { name: key.value, line: at.line(), column: at.column() };
            entries.push((key, Tree::placed(value)));
        }
        Ok(Value::Map(entries))
    }
}
