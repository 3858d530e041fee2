//! Listings: a table for people, JSON for programs.

use clap::ValueEnum;
use comfy_table::{Table, presets};
use serde_json::Value;

/// How a listing is printed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum Format {
    /// A table.
    #[default]
    Table,
    /// One JSON array.
    Json,
}

/// Prints rows, either way. `Value::Null` is what is not known: `-` in a table.
pub fn print(format: Format, columns: &[&str], rows: Vec<Vec<Value>>) {
    match format {
        Format::Table => {
            let mut table = Table::new();
            table.load_style(presets::UTF8_BORDERS_ONLY).set_header(columns.iter().copied());
            for row in rows {
                table.add_row(row.into_iter().map(cell));
            }
            println!("{table}");
        }
        Format::Json => {
            let key = |column: &str| column.to_lowercase().replace(' ', "_");
            let objects: Vec<Value> = rows
                .into_iter()
                .map(|row| {
                    let fields = columns.iter().zip(row).map(|(column, value)| (key(column), value));
                    Value::Object(fields.collect())
                })
                .collect();
            println!("{:#}", Value::Array(objects));
        }
    }
}

fn cell(value: Value) -> String {
    match value {
        Value::Null => "-".to_owned(),
        Value::Bool(yes) => if yes { "yes" } else { "no" }.to_owned(),
        Value::String(text) => text,
        Value::Array(values) => values.into_iter().map(cell).collect::<Vec<_>>().join(", "),
        other => other.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cells() {
        for (value, text) in [
            (Value::Null, "-"),
            (true.into(), "yes"),
            ("a".into(), "a"),
            (7.into(), "7"),
            (vec!["a", "b"].into(), "a, b"),
            (Value::Array(Vec::new()), ""),
        ] {
            assert_eq!(cell(value), text);
        }
    }
}
