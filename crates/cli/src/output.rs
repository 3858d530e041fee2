//! Listings: a table for people, JSON for programs.

use clap::ValueEnum;
use comfy_table::{Table, presets};

/// How a listing is printed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum Format {
    /// A table.
    #[default]
    Table,
    /// One JSON array.
    Json,
}

/// Prints rows, either way.
pub fn print(format: Format, columns: &[&str], rows: Vec<Vec<String>>) {
    match format {
        Format::Table => {
            let mut table = Table::new();
            table.load_style(presets::UTF8_BORDERS_ONLY).set_header(columns.iter().copied());
            for row in rows {
                table.add_row(row);
            }
            println!("{table}");
        }
        Format::Json => {
            let key = |column: &str| column.to_lowercase().replace(' ', "_");
            let objects: Vec<serde_json::Value> = rows
                .into_iter()
                .map(|row| {
                    let fields = columns.iter().zip(row).map(|(column, value)| (key(column), value.into()));
                    serde_json::Value::Object(fields.collect())
                })
                .collect();
            println!("{:#}", serde_json::Value::Array(objects));
        }
    }
}
