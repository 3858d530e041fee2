//! A statement with its parameters, as it travels to the node that runs it.

use rusqlite::ToSql;
use rusqlite::types::{ToSqlOutput, Value};
use serde::Serialize;

use super::{remote_sql, row_serde};
use crate::network::proto;

/// A statement with its parameters: `"SELECT 1"`, `("SELECT ?", params![7])` and so on become one, or step by step:
///
/// ```
/// use raft_sqlite::{Statement, named_params, params};
///
/// let positional = Statement::new("INSERT INTO t VALUES (?, ?)").bind(1).bind("one");
/// assert_eq!(positional, ("INSERT INTO t VALUES (?, ?)", (1, "one")).into());
/// assert_eq!(positional, ("INSERT INTO t VALUES (?, ?)", params![1, "one"]).into());
///
/// let named = Statement::new("INSERT INTO t VALUES (:id, :name)").bind_named(":id", 1).bind_named(":name", "one");
/// assert_eq!(named, ("INSERT INTO t VALUES (:id, :name)", named_params! {":id": 1, ":name": "one"}).into());
///
/// #[derive(serde::Serialize)]
/// struct Word {
///     id: i64,
///     name: &'static str,
/// }
/// assert_eq!(named, Statement::new("INSERT INTO t VALUES (:id, :name)").bind_fields(&Word { id: 1, name: "one" }));
/// ```
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Statement {
    pub(super) sql: String,
    pub(super) positional: Vec<Value>,
    pub(super) named: Vec<(String, Value)>,
    /// The first parameter that is none; told when the statement is run.
    pub(super) refused: Option<String>,
}

impl Statement {
    /// A statement without parameters.
    pub fn new(sql: impl Into<String>) -> Self {
        Self { sql: sql.into(), ..Self::default() }
    }

    /// Its text.
    pub fn sql(&self) -> &str {
        &self.sql
    }

    /// Adds the next positional parameter (`?`): anything that rusqlite's [`ToSql`] knows. One that SQLite has no value for (such as a
    /// `u64` above `i64::MAX`) makes the run of the statement fail.
    #[must_use]
    pub fn bind(mut self, value: impl ToSql) -> Self {
        match value_of(&value) {
            Ok(value) => self.positional.push(value),
            Err(why) => self.refuse(format!("parameter {}: {why}", self.positional.len() + 1)),
        }
        self
    }

    /// Adds a named parameter; `name` with its prefix, such as `:id`.
    #[must_use]
    pub fn bind_named(mut self, name: &str, value: impl ToSql) -> Self {
        match value_of(&value) {
            Ok(value) => self.named.push((name.to_owned(), value)),
            Err(why) => self.refuse(format!("parameter {name}: {why}")),
        }
        self
    }

    /// Adds a named parameter `:field` for each field of a struct, or entry of a map, that serde can take apart.
    #[must_use]
    pub fn bind_fields(mut self, fields: &impl Serialize) -> Self {
        match row_serde::named_values(fields) {
            Ok(values) => {
                self.named.extend(values.into_iter().map(|(name, value)| (format!(":{name}"), value)));
            }
            Err(why) => self.refuse(why.to_string()),
        }
        self
    }

    pub(super) fn to_proto(&self) -> proto::SqlStatement {
        let positional = self.positional.iter().map(|value| (String::new(), value));
        let named = self.named.iter().map(|(name, value)| (name.clone(), value));
        let parameters = positional
            .chain(named)
            .map(|(name, value)| proto::SqlParameter { name, value: Some(remote_sql::to_proto_value(value)) })
            .collect();
        let refused = self.refused.clone().unwrap_or_default();
        proto::SqlStatement { sql: self.sql.clone(), parameters, refused, ..Default::default() }
    }

    fn refuse(&mut self, why: String) {
        self.refused.get_or_insert(why);
    }
}

fn value_of(value: &impl ToSql) -> Result<Value, String> {
    match value.to_sql().map_err(|error| error.to_string())? {
        ToSqlOutput::Owned(value) => Ok(value),
        ToSqlOutput::Borrowed(value) => Value::try_from(value).map_err(|error| error.to_string()),
        other => Err(format!("{other:?} cannot be sent to another node")),
    }
}

/// The parameters of a statement: a tuple or an array of values, `params![...]`, `named_params! {...}`, `()`.
pub trait Parameters {
    /// Adds them.
    fn bind_to(self, statement: Statement) -> Statement;
}

impl Parameters for () {
    fn bind_to(self, statement: Statement) -> Statement {
        statement
    }
}

impl Parameters for &[&dyn ToSql] {
    fn bind_to(self, statement: Statement) -> Statement {
        self.iter().fold(statement, |statement, value| statement.bind(*value))
    }
}

impl Parameters for &[(&str, &dyn ToSql)] {
    fn bind_to(self, statement: Statement) -> Statement {
        self.iter().fold(statement, |statement, (name, value)| statement.bind_named(name, *value))
    }
}

impl<T: ToSql, const N: usize> Parameters for [T; N] {
    fn bind_to(self, statement: Statement) -> Statement {
        self.into_iter().fold(statement, Statement::bind)
    }
}

impl<T: ToSql> Parameters for Vec<T> {
    fn bind_to(self, statement: Statement) -> Statement {
        self.into_iter().fold(statement, Statement::bind)
    }
}

macro_rules! tuples {
    ($($name:ident)*) => {
        impl<$($name: ToSql),*> Parameters for ($($name,)*) {
            #[allow(non_snake_case, reason = "the names of the types are those of the fields")]
            fn bind_to(self, statement: Statement) -> Statement {
                let ($($name,)*) = self;
                statement$(.bind($name))*
            }
        }
    };
}

tuples!(A);
tuples!(A B);
tuples!(A B C);
tuples!(A B C D);
tuples!(A B C D E);
tuples!(A B C D E F);
tuples!(A B C D E F G);
tuples!(A B C D E F G H);
tuples!(A B C D E F G H I);
tuples!(A B C D E F G H I J);
tuples!(A B C D E F G H I J K);
tuples!(A B C D E F G H I J K L);

impl From<&str> for Statement {
    fn from(sql: &str) -> Self {
        Self::new(sql)
    }
}

impl From<String> for Statement {
    fn from(sql: String) -> Self {
        Self::new(sql)
    }
}

impl From<&String> for Statement {
    fn from(sql: &String) -> Self {
        Self::new(sql.as_str())
    }
}

impl<S: Into<String>, P: Parameters> From<(S, P)> for Statement {
    fn from((sql, parameters): (S, P)) -> Self {
        parameters.bind_to(Self::new(sql))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_no_value_is_told_once_and_first() {
        let statement = Statement::new("SELECT ?, ?").bind(u64::MAX).bind(1).bind_fields(&7);
        let why = statement.refused.unwrap();
        assert!(why.starts_with("parameter 1"), "{why}");
        let why = Statement::new("SELECT :a").bind_fields(&7).refused.unwrap();
        assert!(why.contains("struct"), "{why}");
    }
}
