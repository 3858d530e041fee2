//! Values and expressions.

use rusqlite::types::Value;

use super::schema::Column;
use super::{Random, Step};

const WORDS: [&str; 10] = ["able", "baker", "charlie", "dog", "easy", "fox", "george", "how", "item", "jig"];

/// Words of a text that a full-text query finds.
pub fn word(random: &mut Random) -> String {
    format!("{}{}", random.pick(&WORDS), random.below(4))
}

pub fn sentence(random: &mut Random) -> String {
    (0..1 + random.below(8)).map(|_| word(random)).collect::<Vec<_>>().join(" ")
}

/// Bytes that are UTF-8 whatever part of them SQLite makes a text of: other texts cannot be read through rusqlite's values.
fn blob(random: &mut Random, length: u64) -> Value {
    Value::Blob(random.blob(length).into_iter().map(|byte| byte & 0x7f).collect())
}

/// A value of any storage class, now and then over many pages.
pub fn value(random: &mut Random) -> Value {
    match random.below(20) {
        0..=1 => Value::Null,
        2..=6 => Value::Integer(random.below(20) as i64),
        7 => Value::Integer(*random.pick(&[
            &i64::MAX,
            &i64::MIN,
            &-1,
            &(1 << 31),
            &-129,
            &32768,
            &(1 << 47),
            &-140_737_488_355_329,
        ])),
        8 => Value::Integer(random.next() as i64),
        9..=10 => Value::Real(*random.pick(&[
            &0.0,
            &-0.0,
            &1.5,
            &-2.25,
            &1e300,
            &1e-300,
            &3.0,
            &9007199254740993.0,
            &f64::INFINITY,
        ])),
        11 => Value::Real(random.below(1000) as f64 / 8.0),
        12 => {
            let length = random.below(40);
            blob(random, length)
        }
        13 if random.one_in(4) => {
            let length = random.below(60_000);
            blob(random, length)
        }
        14 if random.one_in(4) => Value::Text(sentence(random).repeat(1 + random.below(200) as usize)),
        15 => Value::Text(
            (*random.pick(&[
                &"",
                &"it's",
                &"naïve ☃",
                &"12",
                &" 7 ",
                &"1e3",
                &"0x10",
                &"ABLE",
                &"%_",
                &"a\nb",
                &"-0",
                &"nan",
            ]))
            .to_owned(),
        ),
        16 => Value::Text(json(random, 2)),
        _ => Value::Text(word(random)),
    }
}

pub fn json(random: &mut Random, depth: u64) -> String {
    match random.below(if depth == 0 { 4 } else { 7 }) {
        0 => "null".into(),
        1 => random.below(100).to_string(),
        2 => format!("\"{}\"", word(random)),
        3 => "-1.5e3".into(),
        4 => format!("[{},{}]", json(random, depth - 1), json(random, depth - 1)),
        5 => "{\"a\":[1,{\"b\":2".into(),
        _ => format!("{{\"a\":{},\"b\":{}}}", json(random, depth - 1), json(random, depth - 1)),
    }
}

fn text_of(value: &Value) -> String {
    match value {
        Value::Null => "NULL".into(),
        Value::Integer(number) => number.to_string(),
        Value::Real(number) if number.is_infinite() => "9e999".into(),
        Value::Real(number) => format!("{number:?}"),
        Value::Text(text) => format!("'{}'", text.replace('\'', "''")),
        Value::Blob(bytes) => {
            format!("x'{}'", bytes.iter().map(|byte| format!("{byte:02x}")).collect::<String>())
        }
    }
}

/// Short, and of a kind that does not make most rows fail.
pub fn plain_literal(random: &mut Random) -> String {
    match random.below(5) {
        0 => random.below(100).to_string(),
        1 => format!("-{}.5", random.below(10)),
        2 => format!("x'{:02x}'", random.below(256)),
        _ => format!("'{}'", word(random)),
    }
}

/// Writes a statement with its parameters.
pub struct Writer<'a> {
    pub random: &'a mut Random,
    values: Vec<Value>,
    /// Tables that a subquery may read.
    tables: Vec<&'a str>,
}

impl<'a> Writer<'a> {
    pub fn new(random: &'a mut Random, tables: Vec<&'a str>) -> Self {
        Self { random, values: Vec::new(), tables }
    }

    /// Parameters that the text does not use in the end would be refused.
    pub fn finish(mut self, sql: String) -> Step {
        while !self.values.is_empty() && !sql.contains(&format!("?{}", self.values.len())) {
            self.values.pop();
        }
        Step { sql, values: self.values }
    }

    pub fn bind(&mut self, value: Value) -> String {
        self.values.push(value);
        format!("?{}", self.values.len())
    }

    /// A value: a parameter or written out.
    pub fn literal(&mut self) -> String {
        let value = value(self.random);
        let small = match &value {
            Value::Blob(bytes) => bytes.len() < 100,
            Value::Text(text) => text.len() < 100,
            _ => true,
        };
        if small && self.random.one_in(2) { text_of(&value) } else { self.bind(value) }
    }

    /// A value that suits a column, mostly.
    pub fn value_for(&mut self, column: &Column) -> String {
        if let Some(parent) = column.parent.as_ref().filter(|_| !self.random.one_in(20)) {
            return match self.random.below(3) {
                0 => "NULL".into(),
                1 => format!("(SELECT max(id) FROM {parent})"),
                _ => format!("(SELECT min(id) FROM {parent})"),
            };
        }
        if column.name == "id" {
            return match self.random.below(40) {
                0 => "NULL".into(),
                1 => match value(self.random) {
                    // After the largest rowid SQLite chooses at random.
                    Value::Integer(i64::MAX) => (i64::MAX / 2).to_string(),
                    value => self.bind(value),
                },
                _ => self.random.below(200).to_string(),
            };
        }
        let value = match (column.declared.as_str(), self.random.below(12)) {
            (_, 0) => value(self.random),
            ("INT" | "INTEGER", _) => Value::Integer(self.random.below(60) as i64),
            ("REAL", _) => Value::Real(self.random.below(1000) as f64 / 4.0),
            ("TEXT", _) => Value::Text(sentence(self.random)),
            ("BLOB", _) => {
                let length = if self.random.one_in(10) { self.random.below(30_000) } else { self.random.below(50) };
                blob(self.random, length)
            }
            _ => value(self.random),
        };
        self.bind(value)
    }

    fn column(&mut self, columns: &[&str]) -> String {
        if columns.is_empty() { self.literal() } else { self.random.pick(columns).to_owned() }
    }

    /// An expression over `columns`, of any type.
    pub fn expression(&mut self, columns: &[&str], depth: u64) -> String {
        if depth == 0 || self.random.one_in(4) {
            return if self.random.below(3) > 0 { self.column(columns) } else { self.literal() };
        }
        let depth = depth - 1;
        let first = self.expression(columns, depth);
        match self.random.below(19) {
            0..=1 => {
                let operator = self.random.pick(&["+", "-", "*", "/", "%", "||", "&", "|", "<<", ">>"]);
                format!("({first} {operator} {})", self.expression(columns, depth))
            }
            2..=3 => {
                let operator = self.random.pick(&["=", "<>", "<", "<=", ">", ">=", "IS", "IS NOT", "AND", "OR"]);
                format!("({first} {operator} {})", self.expression(columns, depth))
            }
            4..=5 => {
                let functions =
                    ["length", "lower", "upper", "hex", "quote", "typeof", "trim", "unicode", "abs", "octet_length"];
                format!("{}({first})", self.random.pick(&functions))
            }
            6 => format!("coalesce({first}, {})", self.expression(columns, depth)),
            7 => format!("substr({first}, {}, {})", self.random.below(9) as i64 - 3, self.random.below(9)),
            8 => format!(
                "CASE WHEN {first} THEN {} ELSE {} END",
                self.expression(columns, depth),
                self.expression(columns, depth)
            ),
            9 => format!("CAST({first} AS {})", self.random.pick(&["INTEGER", "REAL", "TEXT", "NUMERIC"])),
            10 => format!("({first} {} '%{}%')", self.random.pick(&["LIKE", "NOT LIKE"]), word(self.random)),
            11 => format!("({first} GLOB '*{}*')", self.random.below(10)),
            12 => format!("({first} BETWEEN {} AND {})", self.random.below(10), self.expression(columns, depth)),
            13 => format!("({first} IN ({}, {}))", self.literal(), self.expression(columns, depth)),
            14 => {
                let function = self.random.pick(&["json_valid", "json_type", "json_quote", "json_array"]);
                format!("{function}({first})")
            }
            15 => format!("json_extract(json_object('k', {first}), '$.k')"),
            16 => format!("{}({first}, {})", self.random.pick(&["nullif", "min", "max", "instr"]), self.literal()),
            17 => format!("printf('%s|%d|%.3f', {first}, {}, {})", self.random.below(9), self.random.below(9)),
            _ if !self.tables.is_empty() => {
                let table = self.random.pick(&self.tables);
                format!("(SELECT count(*) FROM {table})")
            }
            _ => format!("(NOT {first})"),
        }
    }

    /// A condition that is true of some rows.
    pub fn condition(&mut self, columns: &[&str]) -> String {
        match self.random.below(6) {
            0..=1 if columns.contains(&"id") => {
                let low = self.random.below(200);
                format!("id BETWEEN {low} AND {}", low + self.random.below(40))
            }
            2 => format!("{} = {}", self.column(columns), self.literal()),
            3 => {
                let column = self.column(columns);
                format!("{column} IS NOT NULL AND length({column}) % 3 = {}", self.random.below(3))
            }
            _ => self.expression(columns, 2),
        }
    }
}

/// An expression for the schema: no parameters, nothing that may not stand there, and hardly ever an error.
pub fn schema_expression(random: &mut Random, columns: &[&str]) -> String {
    let column = random.pick(columns);
    match random.below(9) {
        0 => format!("length({column})"),
        1 => format!("lower(substr({column}, 1, 5))"),
        2 => format!("typeof({column})"),
        3 => format!("coalesce({column}, {})", plain_literal(random)),
        4 => format!("hex(substr({column}, 1, 3)) || '-' || {}", random.pick(columns)),
        5 => format!("json_valid({column})"),
        6 => format!("{column} + {}", random.below(9)),
        7 => format!("iif({column} IS NULL, {}, {})", random.pick(columns), plain_literal(random)),
        _ => format!("json_object('v', quote({column})) ->> '$.v'"),
    }
}
