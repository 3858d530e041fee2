//! In a program without an async runtime: every call blocks until it is done.
//!
//! `cargo run -p raft-sqlite --example synchronous`

use raft_sqlite::{Migration, NodeConfig, ReadConsistency, Statement, WriteError, blocking, rusqlite};
use serde::{Deserialize, Serialize};

#[derive(Debug, Serialize, Deserialize)]
struct Measurement {
    place: String,
    celsius: f64,
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let folder = tempfile::tempdir()?;
    let node = blocking::Node::start(NodeConfig::single(folder.path()))?;
    let db = node.database("weather");
    let schema = "CREATE TABLE measurement(place TEXT NOT NULL, celsius REAL NOT NULL)";
    db.migrate(&[Migration::new(1, "measurements", schema)])?;

    let insert = "INSERT INTO measurement VALUES (:place, :celsius)";
    for (place, celsius) in [("Zermatt", -3.5), ("Bern", 8.0), ("Lugano", 14.25)] {
        db.execute(Statement::new(insert).bind_fields(&Measurement { place: place.into(), celsius }))?;
    }
    // A program's own logic in one transaction, next to the data: on the node that leads.
    let warmed = db.write(|context| -> rusqlite::Result<usize> {
        let coldest: String =
            context.connection().query_row("SELECT place FROM measurement ORDER BY celsius", [], |row| row.get(0))?;
        context.connection().execute("UPDATE measurement SET celsius = celsius + 1 WHERE place = ?", [coldest])
    });
    match warmed {
        Ok(count) => println!("{count} place is warmer now"),
        Err(WriteError::Closure(error)) => println!("SQLite refused: {error}"),
        Err(error) => return Err(error.into()),
    }

    let all = "SELECT place, celsius FROM measurement ORDER BY celsius";
    for row in db.query_rows(all, ReadConsistency::Local)? {
        let measurement: Measurement = row?.deserialize()?;
        println!("{}: {} degrees", measurement.place, measurement.celsius);
    }
    node.shutdown()?;
    Ok(())
}
