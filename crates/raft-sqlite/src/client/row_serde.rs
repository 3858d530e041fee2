//! serde between rows and types: a row is a map of its columns, or a sequence of its values.

use rusqlite::types::Value;
use serde::de::value::{SeqDeserializer, StrDeserializer};
use serde::de::{self, DeserializeSeed, IntoDeserializer, MapAccess, SeqAccess, Visitor};
use serde::ser::{self, Impossible, Serialize};
use serde::{Deserializer, forward_to_deserialize_any};

use super::row::{RowError, kind};

impl de::Error for RowError {
    fn custom<T: std::fmt::Display>(message: T) -> Self {
        RowError::Shape(message.to_string())
    }
}

impl ser::Error for RowError {
    fn custom<T: std::fmt::Display>(message: T) -> Self {
        RowError::Shape(message.to_string())
    }
}

#[derive(Clone, Copy)]
pub(super) struct RowDeserializer<'a> {
    pub columns: &'a [String],
    pub values: &'a [Value],
}

impl<'a> RowDeserializer<'a> {
    /// The value of a row of one column.
    fn only(self) -> Result<ValueDeserializer<'a>, RowError> {
        match (self.columns, self.values) {
            ([column], [value]) => Ok(ValueDeserializer { column, value }),
            (columns, _) => Err(RowError::Shape(format!(
                "a row of {} columns is no single value: read it as a tuple or a struct",
                columns.len()
            ))),
        }
    }
}

macro_rules! from_only_value {
    ($($method:ident)*) => {
        $(fn $method<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, RowError> {
            self.only()?.$method(visitor)
        })*
    };
}

impl<'de> Deserializer<'de> for RowDeserializer<'_> {
    type Error = RowError;

    fn deserialize_any<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, RowError> {
        visitor.visit_map(Fields { row: self, next: 0 })
    }

    fn deserialize_seq<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, RowError> {
        match self.values {
            // `Vec<u8>`
            [Value::Blob(_)] => self.only()?.deserialize_seq(visitor),
            _ => visitor.visit_seq(Fields { row: self, next: 0 }),
        }
    }

    fn deserialize_tuple<V: Visitor<'de>>(self, len: usize, visitor: V) -> Result<V::Value, RowError> {
        if len != self.columns.len() {
            return Err(RowError::Shape(format!("a row of {} columns is no tuple of {len}", self.columns.len())));
        }
        visitor.visit_seq(Fields { row: self, next: 0 })
    }

    fn deserialize_tuple_struct<V: Visitor<'de>>(
        self,
        _name: &'static str,
        len: usize,
        visitor: V,
    ) -> Result<V::Value, RowError> {
        self.deserialize_tuple(len, visitor)
    }

    fn deserialize_newtype_struct<V: Visitor<'de>>(
        self,
        _name: &'static str,
        visitor: V,
    ) -> Result<V::Value, RowError> {
        visitor.visit_newtype_struct(self)
    }

    fn deserialize_enum<V: Visitor<'de>>(
        self,
        name: &'static str,
        variants: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, RowError> {
        self.only()?.deserialize_enum(name, variants, visitor)
    }

    from_only_value! {
        deserialize_bool deserialize_i8 deserialize_i16 deserialize_i32 deserialize_i64 deserialize_i128 deserialize_u8 deserialize_u16
        deserialize_u32 deserialize_u64 deserialize_u128 deserialize_f32 deserialize_f64 deserialize_char deserialize_str
        deserialize_string deserialize_bytes deserialize_byte_buf deserialize_option deserialize_unit
    }

    forward_to_deserialize_any! { unit_struct map struct identifier ignored_any }
}

struct Fields<'a> {
    row: RowDeserializer<'a>,
    next: usize,
}

impl<'de> MapAccess<'de> for Fields<'_> {
    type Error = RowError;

    fn next_key_seed<K: DeserializeSeed<'de>>(&mut self, seed: K) -> Result<Option<K::Value>, RowError> {
        match self.row.columns.get(self.next) {
            Some(column) => seed.deserialize(column.as_str().into_deserializer()).map(Some),
            None => Ok(None),
        }
    }

    fn next_value_seed<V: DeserializeSeed<'de>>(&mut self, seed: V) -> Result<V::Value, RowError> {
        let (column, value) = (&self.row.columns[self.next], &self.row.values[self.next]);
        self.next += 1;
        seed.deserialize(ValueDeserializer { column, value }).map_err(|error| in_column(column, error))
    }

    fn size_hint(&self) -> Option<usize> {
        Some(self.row.columns.len() - self.next)
    }
}

impl<'de> SeqAccess<'de> for Fields<'_> {
    type Error = RowError;

    fn next_element_seed<T: DeserializeSeed<'de>>(&mut self, seed: T) -> Result<Option<T::Value>, RowError> {
        if self.next == self.row.columns.len() {
            return Ok(None);
        }
        self.next_value_seed(seed).map(Some)
    }

    fn size_hint(&self) -> Option<usize> {
        MapAccess::size_hint(self)
    }
}

fn in_column(column: &str, error: RowError) -> RowError {
    match error {
        RowError::Shape(why) => RowError::Value { column: column.to_owned(), why },
        other => other,
    }
}

#[derive(Clone, Copy)]
struct ValueDeserializer<'a> {
    column: &'a str,
    value: &'a Value,
}

impl<'de> Deserializer<'de> for ValueDeserializer<'_> {
    type Error = RowError;

    fn deserialize_any<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, RowError> {
        let visited = match self.value {
            Value::Null => visitor.visit_unit(),
            Value::Integer(number) => visitor.visit_i64(*number),
            Value::Real(number) => visitor.visit_f64(*number),
            Value::Text(text) => visitor.visit_str(text),
            Value::Blob(bytes) => visitor.visit_bytes(bytes),
        };
        visited.map_err(|error| in_column(self.column, error))
    }

    fn deserialize_bool<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, RowError> {
        match self.value {
            Value::Integer(number @ (0 | 1)) => visitor.visit_bool(*number == 1),
            _ => self.deserialize_any(visitor),
        }
    }

    fn deserialize_option<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, RowError> {
        match self.value {
            Value::Null => visitor.visit_none(),
            _ => visitor.visit_some(self),
        }
    }

    /// A blob is a sequence of its bytes: what `Vec<u8>` asks for.
    fn deserialize_seq<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, RowError> {
        match self.value {
            Value::Blob(bytes) => visitor.visit_seq(SeqDeserializer::new(bytes.iter().copied())),
            _ => self.deserialize_any(visitor),
        }
    }

    fn deserialize_tuple<V: Visitor<'de>>(self, _len: usize, visitor: V) -> Result<V::Value, RowError> {
        self.deserialize_seq(visitor)
    }

    fn deserialize_byte_buf<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, RowError> {
        match self.value {
            Value::Blob(bytes) => visitor.visit_byte_buf(bytes.clone()),
            _ => self.deserialize_any(visitor),
        }
    }

    fn deserialize_newtype_struct<V: Visitor<'de>>(
        self,
        _name: &'static str,
        visitor: V,
    ) -> Result<V::Value, RowError> {
        visitor.visit_newtype_struct(self)
    }

    fn deserialize_enum<V: Visitor<'de>>(
        self,
        name: &'static str,
        variants: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, RowError> {
        match self.value {
            Value::Text(text) => StrDeserializer::new(text).deserialize_enum(name, variants, visitor),
            other => Err(RowError::Value {
                column: self.column.to_owned(),
                why: format!("{} is no variant of {name}: a text is wanted", kind(other)),
            }),
        }
    }

    forward_to_deserialize_any! {
        i8 i16 i32 i64 i128 u8 u16 u32 u64 u128 f32 f64 char str string bytes unit unit_struct tuple_struct map struct identifier
        ignored_any
    }
}

/// The fields of a struct, or the entries of a map, with their values.
///
/// # Errors
/// It is neither, or a value is none of SQLite's.
pub(super) fn named_values(fields: &impl Serialize) -> Result<Vec<(String, Value)>, RowError> {
    fields.serialize(FieldsSerializer)
}

fn no_fields() -> RowError {
    RowError::Shape("named parameters come from a struct or a map: this is neither".into())
}

/// Implements the methods of a [`ser::Serializer`] that give `$error`, by name.
macro_rules! refuse {
    ($error:expr; $($method:ident($($argument:ty),*) -> $ok:ty;)*) => {
        $(fn $method(self $(, _: $argument)*) -> Result<$ok, RowError> {
            Err($error)
        })*
    };
}

struct FieldsSerializer;

type NoFields = Impossible<Vec<(String, Value)>, RowError>;

impl ser::Serializer for FieldsSerializer {
    type Ok = Vec<(String, Value)>;
    type Error = RowError;
    type SerializeSeq = NoFields;
    type SerializeTuple = NoFields;
    type SerializeTupleStruct = NoFields;
    type SerializeTupleVariant = NoFields;
    type SerializeMap = FieldList;
    type SerializeStruct = FieldList;
    type SerializeStructVariant = NoFields;

    fn serialize_struct(self, _name: &'static str, len: usize) -> Result<FieldList, RowError> {
        Ok(FieldList { fields: Vec::with_capacity(len), key: None })
    }

    fn serialize_map(self, len: Option<usize>) -> Result<FieldList, RowError> {
        Ok(FieldList { fields: Vec::with_capacity(len.unwrap_or(0)), key: None })
    }

    fn serialize_newtype_struct<T: Serialize + ?Sized>(
        self,
        _name: &'static str,
        value: &T,
    ) -> Result<Self::Ok, RowError> {
        value.serialize(self)
    }

    fn serialize_some<T: Serialize + ?Sized>(self, value: &T) -> Result<Self::Ok, RowError> {
        value.serialize(self)
    }

    fn serialize_newtype_variant<T: Serialize + ?Sized>(
        self,
        _name: &'static str,
        _index: u32,
        _variant: &'static str,
        _value: &T,
    ) -> Result<Self::Ok, RowError> {
        Err(no_fields())
    }

    refuse! { no_fields();
        serialize_bool(bool) -> Self::Ok;
        serialize_i8(i8) -> Self::Ok;
        serialize_i16(i16) -> Self::Ok;
        serialize_i32(i32) -> Self::Ok;
        serialize_i64(i64) -> Self::Ok;
        serialize_u8(u8) -> Self::Ok;
        serialize_u16(u16) -> Self::Ok;
        serialize_u32(u32) -> Self::Ok;
        serialize_u64(u64) -> Self::Ok;
        serialize_f32(f32) -> Self::Ok;
        serialize_f64(f64) -> Self::Ok;
        serialize_char(char) -> Self::Ok;
        serialize_str(&str) -> Self::Ok;
        serialize_bytes(&[u8]) -> Self::Ok;
        serialize_none() -> Self::Ok;
        serialize_unit() -> Self::Ok;
        serialize_unit_struct(&'static str) -> Self::Ok;
        serialize_unit_variant(&'static str, u32, &'static str) -> Self::Ok;
        serialize_seq(Option<usize>) -> NoFields;
        serialize_tuple(usize) -> NoFields;
        serialize_tuple_struct(&'static str, usize) -> NoFields;
        serialize_tuple_variant(&'static str, u32, &'static str, usize) -> NoFields;
        serialize_struct_variant(&'static str, u32, &'static str, usize) -> NoFields;
    }
}

struct FieldList {
    fields: Vec<(String, Value)>,
    key: Option<String>,
}

impl FieldList {
    fn push<T: Serialize + ?Sized>(&mut self, name: String, value: &T) -> Result<(), RowError> {
        let value = value.serialize(ValueSerializer).map_err(|error| in_column(&name, error))?;
        self.fields.push((name, value));
        Ok(())
    }
}

impl ser::SerializeStruct for FieldList {
    type Ok = Vec<(String, Value)>;
    type Error = RowError;

    fn serialize_field<T: Serialize + ?Sized>(&mut self, name: &'static str, value: &T) -> Result<(), RowError> {
        self.push(name.to_owned(), value)
    }

    fn end(self) -> Result<Self::Ok, RowError> {
        Ok(self.fields)
    }
}

impl ser::SerializeMap for FieldList {
    type Ok = Vec<(String, Value)>;
    type Error = RowError;

    fn serialize_key<T: Serialize + ?Sized>(&mut self, key: &T) -> Result<(), RowError> {
        match key.serialize(ValueSerializer)? {
            Value::Text(key) => self.key = Some(key),
            other => return Err(RowError::Shape(format!("{} is no name for a parameter", kind(&other)))),
        }
        Ok(())
    }

    fn serialize_value<T: Serialize + ?Sized>(&mut self, value: &T) -> Result<(), RowError> {
        let key = self.key.take().ok_or_else(|| RowError::Shape("a value without a key".into()))?;
        self.push(key, value)
    }

    fn end(self) -> Result<Self::Ok, RowError> {
        Ok(self.fields)
    }
}

struct ValueSerializer;

fn no_value() -> RowError {
    RowError::Shape(
        "neither a number, a text, bytes nor an option of these: give it as one of them, for example as JSON text"
            .into(),
    )
}

type NoValue = Impossible<Value, RowError>;

impl ser::Serializer for ValueSerializer {
    type Ok = Value;
    type Error = RowError;
    type SerializeSeq = ByteList;
    type SerializeTuple = ByteList;
    type SerializeTupleStruct = NoValue;
    type SerializeTupleVariant = NoValue;
    type SerializeMap = NoValue;
    type SerializeStruct = NoValue;
    type SerializeStructVariant = NoValue;

    fn serialize_bool(self, value: bool) -> Result<Value, RowError> {
        Ok(Value::Integer(value.into()))
    }

    fn serialize_i8(self, value: i8) -> Result<Value, RowError> {
        Ok(Value::Integer(value.into()))
    }

    fn serialize_i16(self, value: i16) -> Result<Value, RowError> {
        Ok(Value::Integer(value.into()))
    }

    fn serialize_i32(self, value: i32) -> Result<Value, RowError> {
        Ok(Value::Integer(value.into()))
    }

    fn serialize_i64(self, value: i64) -> Result<Value, RowError> {
        Ok(Value::Integer(value))
    }

    fn serialize_u8(self, value: u8) -> Result<Value, RowError> {
        Ok(Value::Integer(value.into()))
    }

    fn serialize_u16(self, value: u16) -> Result<Value, RowError> {
        Ok(Value::Integer(value.into()))
    }

    fn serialize_u32(self, value: u32) -> Result<Value, RowError> {
        Ok(Value::Integer(value.into()))
    }

    fn serialize_u64(self, value: u64) -> Result<Value, RowError> {
        i64::try_from(value)
            .map(Value::Integer)
            .map_err(|_| RowError::Shape(format!("{value} is above the largest INTEGER, {}", i64::MAX)))
    }

    fn serialize_f32(self, value: f32) -> Result<Value, RowError> {
        Ok(Value::Real(value.into()))
    }

    fn serialize_f64(self, value: f64) -> Result<Value, RowError> {
        Ok(Value::Real(value))
    }

    fn serialize_char(self, value: char) -> Result<Value, RowError> {
        Ok(Value::Text(value.into()))
    }

    fn serialize_str(self, value: &str) -> Result<Value, RowError> {
        Ok(Value::Text(value.into()))
    }

    fn serialize_bytes(self, value: &[u8]) -> Result<Value, RowError> {
        Ok(Value::Blob(value.into()))
    }

    fn serialize_none(self) -> Result<Value, RowError> {
        Ok(Value::Null)
    }

    fn serialize_unit(self) -> Result<Value, RowError> {
        Ok(Value::Null)
    }

    fn serialize_some<T: Serialize + ?Sized>(self, value: &T) -> Result<Value, RowError> {
        value.serialize(self)
    }

    fn serialize_newtype_struct<T: Serialize + ?Sized>(
        self,
        _name: &'static str,
        value: &T,
    ) -> Result<Value, RowError> {
        value.serialize(self)
    }

    fn serialize_unit_variant(
        self,
        _name: &'static str,
        _index: u32,
        variant: &'static str,
    ) -> Result<Value, RowError> {
        Ok(Value::Text(variant.into()))
    }

    fn serialize_newtype_variant<T: Serialize + ?Sized>(
        self,
        _name: &'static str,
        _index: u32,
        _variant: &'static str,
        _value: &T,
    ) -> Result<Value, RowError> {
        Err(no_value())
    }

    fn serialize_seq(self, len: Option<usize>) -> Result<ByteList, RowError> {
        Ok(ByteList(Vec::with_capacity(len.unwrap_or(0))))
    }

    fn serialize_tuple(self, len: usize) -> Result<ByteList, RowError> {
        self.serialize_seq(Some(len))
    }

    refuse! { no_value();
        serialize_unit_struct(&'static str) -> Value;
        serialize_tuple_struct(&'static str, usize) -> NoValue;
        serialize_tuple_variant(&'static str, u32, &'static str, usize) -> NoValue;
        serialize_map(Option<usize>) -> NoValue;
        serialize_struct(&'static str, usize) -> NoValue;
        serialize_struct_variant(&'static str, u32, &'static str, usize) -> NoValue;
    }
}

/// `Vec<u8>` comes as a sequence of numbers: a blob. Of other numbers SQLite has no sequences.
struct ByteList(Vec<u8>);

impl ByteList {
    fn push<T: Serialize + ?Sized>(&mut self, value: &T) -> Result<(), RowError> {
        let Value::Integer(number) = value.serialize(ValueSerializer)? else { return Err(no_value()) };
        self.0.push(u8::try_from(number).map_err(|_| no_value())?);
        Ok(())
    }
}

impl ser::SerializeSeq for ByteList {
    type Ok = Value;
    type Error = RowError;

    fn serialize_element<T: Serialize + ?Sized>(&mut self, value: &T) -> Result<(), RowError> {
        self.push(value)
    }

    fn end(self) -> Result<Value, RowError> {
        Ok(Value::Blob(self.0))
    }
}

impl ser::SerializeTuple for ByteList {
    type Ok = Value;
    type Error = RowError;

    fn serialize_element<T: Serialize + ?Sized>(&mut self, value: &T) -> Result<(), RowError> {
        self.push(value)
    }

    fn end(self) -> Result<Value, RowError> {
        Ok(Value::Blob(self.0))
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use serde::{Deserialize, Serialize};

    use super::super::row::{Row, RowError};
    use super::*;

    #[derive(Debug, PartialEq, Serialize, Deserialize)]
    #[serde(rename_all = "lowercase")]
    enum State {
        Open,
        Done,
    }

    #[derive(Debug, PartialEq, Serialize, Deserialize)]
    struct Id(i64);

    #[derive(Debug, PartialEq, Serialize, Deserialize)]
    struct Job {
        id: Id,
        name: String,
        state: State,
        data: Vec<u8>,
        weight: f64,
        urgent: bool,
        note: Option<String>,
        small: u8,
    }

    fn job() -> Job {
        Job {
            id: Id(7),
            name: "n".into(),
            state: State::Done,
            data: vec![0, 255],
            weight: f64::INFINITY,
            urgent: true,
            note: None,
            small: 200,
        }
    }

    fn row(fields: Vec<(String, Value)>) -> Row {
        let (columns, values): (Vec<String>, Vec<Value>) = fields.into_iter().unzip();
        Row::new(columns.into(), values)
    }

    fn one(value: impl Into<Value>) -> Row {
        row(vec![("v".into(), value.into())])
    }

    #[test]
    fn a_struct_comes_back_as_it_went() {
        let fields = named_values(&job()).unwrap();
        assert_eq!(fields[3], ("data".into(), Value::Blob(vec![0, 255])));
        let mut with_more = fields.clone();
        with_more.insert(0, ("other".into(), Value::Null));
        assert_eq!(row(with_more).deserialize::<Job>().unwrap(), job());
        assert_eq!(named_values(&Some(job())).unwrap(), fields);
    }

    #[test]
    fn tuples_maps_and_single_values() {
        let pair = row(vec![("a".into(), Value::Integer(1)), ("b".into(), Value::Text("x".into()))]);
        assert_eq!(pair.deserialize::<(i64, String)>().unwrap(), (1, "x".into()));
        let map = BTreeMap::from([("k", 3.5)]);
        assert_eq!(row(named_values(&map).unwrap()).deserialize::<BTreeMap<String, f64>>().unwrap()["k"], 3.5);
        assert_eq!(one(5).deserialize::<u8>().unwrap(), 5);
        assert_eq!(one(5).deserialize::<Id>().unwrap(), Id(5));
        assert_eq!(one(2).deserialize::<f64>().unwrap(), 2.0);
        assert_eq!(one("done".to_owned()).deserialize::<State>().unwrap(), State::Done);
        assert_eq!(one(Value::Null).deserialize::<Option<i64>>().unwrap(), None);
        assert_eq!(one(vec![1, 2]).deserialize::<Vec<u8>>().unwrap(), [1, 2]);
        assert_eq!(one(vec![1, 2]).deserialize::<(Vec<u8>,)>().unwrap(), (vec![1, 2],));
    }

    #[test]
    fn what_does_not_fit_is_told_with_its_column() {
        let refused = |row: Row, want: &str| {
            let error = row.deserialize::<Job>().unwrap_err().to_string();
            assert!(error.contains(want), "{error}");
        };
        let with = |name: &str, value: Value| {
            let mut fields = named_values(&job()).unwrap();
            fields.iter_mut().find(|field| field.0 == name).unwrap().1 = value;
            row(fields)
        };
        refused(with("small", Value::Integer(256)), "column \"small\"");
        refused(with("name", Value::Integer(1)), "column \"name\"");
        refused(with("urgent", Value::Integer(2)), "column \"urgent\"");
        refused(with("state", Value::Text("lost".into())), "unknown variant `lost`");
        refused(with("weight", Value::Null), "column \"weight\"");
        refused(one(1), "missing field");
        let error = one(1).deserialize::<(i64, i64)>().unwrap_err();
        assert_eq!(error.to_string(), "a row of 1 columns is no tuple of 2");
        let two = row(vec![("a".into(), Value::Null), ("b".into(), Value::Null)]);
        assert!(two.deserialize::<i64>().unwrap_err().to_string().contains("no single value"));
        assert!(named_values(&BTreeMap::from([("k", vec![256])])).unwrap_err().to_string().contains("column \"k\""));
        assert!(named_values(&BTreeMap::from([("k", u64::MAX)])).unwrap_err().to_string().contains("largest INTEGER"));
    }

    #[test]
    fn values_by_name_and_position() {
        let row = row(vec![("Id".into(), Value::Integer(300)), ("t".into(), Value::Text("x".into()))]);
        assert_eq!(row.get::<i64>("id").unwrap(), 300);
        assert_eq!(row.get::<Option<String>>(1).unwrap().unwrap(), "x");
        assert_eq!(row.get::<u8>("id").unwrap_err().to_string(), "column \"Id\": 300 does not fit u8");
        assert_eq!(row.get::<i64>("t").unwrap_err().to_string(), "column \"t\": a TEXT is no i64");
        let error = row.get::<i64>("gone").unwrap_err();
        assert!(matches!(&error, RowError::NoColumn { columns, .. } if columns == &["Id", "t"]), "{error}");
        assert_eq!(error.to_string(), "no column \"gone\": the result has \"Id\", \"t\"");
    }
}
