//! What a query gives: rows of values, read by column name or position, or through serde.

use std::any::type_name;
use std::ops::Index;
use std::sync::Arc;

use rusqlite::types::{FromSql, FromSqlError, Value, ValueRef};
use serde::de::DeserializeOwned;

/// A column of a row, by position from 0 or by name. Names are compared as SQLite does: ASCII letters in any case.
pub trait ColumnIndex {
    /// Its position in `columns`; None: there is none such.
    fn position(&self, columns: &[String]) -> Option<usize>;
    /// For messages.
    fn describe(&self) -> String;
}

impl ColumnIndex for usize {
    fn position(&self, columns: &[String]) -> Option<usize> {
        (*self < columns.len()).then_some(*self)
    }

    fn describe(&self) -> String {
        format!("number {self}")
    }
}

impl ColumnIndex for &str {
    fn position(&self, columns: &[String]) -> Option<usize> {
        columns.iter().position(|column| column.eq_ignore_ascii_case(self))
    }

    fn describe(&self) -> String {
        format!("{self:?}")
    }
}

/// Why a row was not what its reader expected. The query itself went well.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum RowError {
    /// There is no row.
    #[error("the query gave no row")]
    NoRow,
    /// There is no such column.
    #[error("no column {column}: the result has {}", list(.columns))]
    NoColumn {
        /// The one asked for.
        column: String,
        /// Those there are.
        columns: Vec<String>,
    },
    /// A value does not fit the type asked for.
    #[error("column {column:?}: {why}")]
    Value {
        /// Its name.
        column: String,
        /// What does not fit.
        why: String,
    },
    /// The row does not fit the type it was to become.
    #[error("{0}")]
    Shape(String),
}

fn list(columns: &[String]) -> String {
    columns.iter().map(|column| format!("{column:?}")).collect::<Vec<_>>().join(", ")
}

/// What a value is, for messages.
pub(super) fn kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "NULL",
        Value::Integer(_) => "an INTEGER",
        Value::Real(_) => "a REAL",
        Value::Text(_) => "a TEXT",
        Value::Blob(_) => "a BLOB",
    }
}

/// One row.
#[derive(Clone, PartialEq)]
pub struct Row {
    columns: Arc<[String]>,
    values: Vec<Value>,
}

impl std::fmt::Debug for Row {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_map().entries(self.columns.iter().zip(&self.values)).finish()
    }
}

impl Row {
    pub(super) fn new(columns: Arc<[String]>, values: Vec<Value>) -> Self {
        debug_assert_eq!(columns.len(), values.len());
        Self { columns, values }
    }

    /// A value as a Rust type: numbers, `bool`, `String`, `Vec<u8>`, `Option` of these, [`Value`], or any other that implements
    /// rusqlite's [`FromSql`].
    ///
    /// ```
    /// # fn read(row: &raft_sqlite::Row) -> Result<(), raft_sqlite::RowError> {
    /// let id: i64 = row.get("id")?;
    /// let name: Option<String> = row.get(1)?;
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    /// [`RowError::NoColumn`]; [`RowError::Value`] when the value is of another type or out of range.
    pub fn get<T: FromSql>(&self, column: impl ColumnIndex) -> Result<T, RowError> {
        let position = self.find(&column)?;
        let value = &self.values[position];
        T::column_result(ValueRef::from(value)).map_err(|error| {
            let (found, wanted) = (kind(value), type_name::<T>());
            let why = match error {
                FromSqlError::OutOfRange(number) => format!("{number} does not fit {wanted}"),
                FromSqlError::Other(why) => why.to_string(),
                FromSqlError::InvalidType => format!("{found} is no {wanted}"),
                other => format!("{found} is no {wanted}: {other}"),
            };
            RowError::Value { column: self.columns[position].clone(), why }
        })
    }

    /// The row as a type that serde knows: a struct whose fields are named as the columns, a tuple of as many fields, or, if there is
    /// one column only, a single value.
    ///
    /// Integers become numbers and `bool` (0 is false), texts strings and enums without content, blobs `Vec<u8>` and bytes, NULL `None`.
    /// Columns that no field is named after are passed over; fields of other types need a text and `#[serde(with = ...)]`.
    ///
    /// # Errors
    /// [`RowError::Value`], [`RowError::Shape`].
    pub fn deserialize<T: DeserializeOwned>(&self) -> Result<T, RowError> {
        T::deserialize(super::row_serde::RowDeserializer { columns: &self.columns, values: &self.values })
    }

    /// Column names.
    pub fn columns(&self) -> &[String] {
        &self.columns
    }

    /// The values, in the order of the columns.
    pub fn values(&self) -> &[Value] {
        &self.values
    }

    /// The values, in the order of the columns.
    pub fn into_values(self) -> Vec<Value> {
        self.values
    }

    fn find(&self, column: &impl ColumnIndex) -> Result<usize, RowError> {
        column
            .position(&self.columns)
            .ok_or_else(|| RowError::NoColumn { column: column.describe(), columns: self.columns.to_vec() })
    }
}

impl Index<usize> for Row {
    type Output = Value;

    /// # Panics
    /// There is no such column.
    fn index(&self, column: usize) -> &Value {
        &self.values[column]
    }
}

/// A whole result.
#[derive(Clone, PartialEq)]
pub struct Rows {
    columns: Arc<[String]>,
    rows: Vec<Row>,
}

impl std::fmt::Debug for Rows {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_list().entries(&self.rows).finish()
    }
}

impl Default for Rows {
    fn default() -> Self {
        Self { columns: Arc::new([]), rows: Vec::new() }
    }
}

impl Rows {
    pub(super) fn new(columns: Vec<String>, rows: Vec<Vec<Value>>) -> Self {
        let columns: Arc<[String]> = columns.into();
        let rows = rows.into_iter().map(|values| Row::new(columns.clone(), values)).collect();
        Self { columns, rows }
    }

    pub(super) fn of(columns: Arc<[String]>, rows: Vec<Row>) -> Self {
        Self { columns, rows }
    }

    /// Column names, also of a result without rows.
    pub fn columns(&self) -> &[String] {
        &self.columns
    }

    /// How many rows.
    pub fn len(&self) -> usize {
        self.rows.len()
    }

    /// Whether there is no row.
    pub fn is_empty(&self) -> bool {
        self.rows.is_empty()
    }

    /// The first row, if there is one.
    pub fn first(&self) -> Option<&Row> {
        self.rows.first()
    }

    /// The rows in order.
    pub fn iter(&self) -> std::slice::Iter<'_, Row> {
        self.rows.iter()
    }

    /// Each row as a type that serde knows; see [`Row::deserialize`].
    ///
    /// # Errors
    /// Of the first row that does not fit.
    pub fn deserialize<T: DeserializeOwned>(&self) -> Result<Vec<T>, RowError> {
        self.rows.iter().map(Row::deserialize).collect()
    }

    /// All values, row by row.
    pub fn into_values(self) -> Vec<Vec<Value>> {
        self.rows.into_iter().map(Row::into_values).collect()
    }
}

impl Index<usize> for Rows {
    type Output = Row;

    /// # Panics
    /// There is no such row.
    fn index(&self, row: usize) -> &Row {
        &self.rows[row]
    }
}

impl IntoIterator for Rows {
    type Item = Row;
    type IntoIter = std::vec::IntoIter<Row>;

    fn into_iter(self) -> Self::IntoIter {
        self.rows.into_iter()
    }
}

impl<'a> IntoIterator for &'a Rows {
    type Item = &'a Row;
    type IntoIter = std::slice::Iter<'a, Row>;

    fn into_iter(self) -> Self::IntoIter {
        self.rows.iter()
    }
}
