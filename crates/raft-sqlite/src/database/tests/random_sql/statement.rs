//! Statements that change something.

use super::expression::{Writer, plain_literal, schema_expression, sentence, word};
use super::schema::{Kind, Schema, Table};
use super::{Random, Step};

/// Most objects of a kind.
const MOST_TABLES: usize = 9;
const MOST_INDICES: usize = 10;
const MOST_TRIGGERS: usize = 6;

/// The savepoints that are open in a transaction.
#[derive(Debug, Default)]
pub struct SavePoints(Vec<String>);

/// The next statement of a transaction.
pub fn statement(random: &mut Random, schema: &Schema, savepoints: &mut SavePoints) -> Step {
    let few = schema.tables.len() < 4;
    match random.below(100) {
        kind if few && kind < 60 => create_table(random, schema),
        0..=4 => create_table(random, schema),
        5..=8 => create_index(random, schema),
        9..=11 => create_trigger(random, schema),
        12..=13 => create_view(random, schema),
        14..=18 => alter_table(random, schema),
        19..=20 => drop_object(random, schema),
        21..=22 => maintenance(random, schema),
        23..=28 => savepoint(random, savepoints),
        29 => wrong(random, schema),
        30..=41 => virtual_table(random, schema),
        42..=65 => insert(random, schema),
        66..=71 => insert_select(random, schema),
        72..=87 => update(random, schema),
        _ => delete(random, schema),
    }
}

fn free_name(random: &mut Random, taken: &[&str], prefix: &str) -> String {
    let at = random.below(20);
    (at..).map(|number| format!("{prefix}{number}")).find(|name| !taken.contains(&name.as_str())).expect("endless")
}

fn create_table(random: &mut Random, schema: &Schema) -> Step {
    let names = schema.names();
    if schema.tables.len() >= MOST_TABLES {
        return drop_object(random, schema);
    }
    match random.below(16) {
        0 => {
            let name = free_name(random, &names, "qf");
            let options = random.pick(&[
                "",
                ", tokenize = 'porter ascii'",
                ", prefix = '2 3'",
                ", detail = column",
                ", columnsize = 0",
                ", content = '', contentless_delete = 1",
                ", tokenize = 'trigram'",
            ]);
            return format!("CREATE VIRTUAL TABLE {name} USING fts5(title, body UNINDEXED, note{options})").into();
        }
        1 => {
            let name = free_name(random, &names, "qr");
            let module = random.pick(&["rtree", "rtree_i32"]);
            return format!("CREATE VIRTUAL TABLE {name} USING {module}(id, x0, x1, y0, y1, +note)").into();
        }
        2 => {
            if let Some(from) = schema.plain(random) {
                let name = free_name(random, &names, "qt");
                return format!("CREATE TABLE {name} AS SELECT * FROM {} ORDER BY id", from.name).into();
            }
        }
        _ => {}
    }
    let strict = random.one_in(6);
    let without_rowid = random.one_in(4);
    let name = free_name(random, &names, if without_rowid { "qw" } else { "qt" });
    let mut columns: Vec<String> = Vec::new();
    let mut columns_named = vec!["id".to_owned()];
    let mut constraints = Vec::new();
    match random.below(5) {
        0 => {
            columns.push("id INTEGER NOT NULL".into());
            columns.push("sub TEXT NOT NULL DEFAULT ''".into());
            columns_named.push("sub".into());
            constraints.push("PRIMARY KEY (id, sub)".into());
        }
        1 if !without_rowid => columns.push("id INTEGER PRIMARY KEY AUTOINCREMENT".into()),
        2 if strict => columns.push("id TEXT PRIMARY KEY".into()),
        2 => columns.push("id PRIMARY KEY DESC".into()),
        _ => columns.push("id INTEGER PRIMARY KEY".into()),
    }
    for number in 0..1 + random.below(5) {
        let column = format!("c{number}");
        columns.push(column_definition(random, schema, &column, &columns_named, strict));
        columns_named.push(column);
    }
    let named: Vec<&str> = columns_named.iter().map(String::as_str).collect();
    if random.one_in(4) {
        constraints.push(format!(
            "UNIQUE ({}, {}) {}",
            random.pick(&named),
            random.pick(&named),
            random.pick(&["", "ON CONFLICT REPLACE", "ON CONFLICT IGNORE", "ON CONFLICT FAIL"])
        ));
    }
    if random.one_in(5) {
        constraints.push(format!("CONSTRAINT narrow CHECK (length({}) < 25000)", random.pick(&named)));
    }
    columns.extend(constraints);
    let options = match (strict, without_rowid) {
        (true, true) => " STRICT, WITHOUT ROWID",
        (true, false) => " STRICT",
        (false, true) => " WITHOUT ROWID",
        (false, false) => "",
    };
    format!("CREATE TABLE {name}({}){options}", columns.join(", ")).into()
}

fn column_definition(random: &mut Random, schema: &Schema, name: &str, before: &[String], strict: bool) -> String {
    let types: &[&str] = if strict {
        &["INT", "REAL", "TEXT", "BLOB", "ANY"]
    } else {
        &["INT", "REAL", "TEXT", "BLOB", "NUMERIC", "", "VARCHAR(10)"]
    };
    let mut definition = format!("{name} {}", random.pick(types));
    let before: Vec<&str> = before.iter().map(String::as_str).collect();
    match random.below(14) {
        0 if !strict => {
            let expression = schema_expression(random, &before);
            let kind = random.pick(&["STORED", "VIRTUAL"]);
            return format!("{definition} GENERATED ALWAYS AS ({expression}) {kind}");
        }
        1 => definition.push_str(" UNIQUE"),
        2 => definition.push_str(" NOT NULL"),
        3 if !strict => {
            let literal = plain_literal(random);
            definition.push_str(&format!(" NOT NULL ON CONFLICT REPLACE DEFAULT ({literal} || 'x')"));
        }
        4 => definition.push_str(&format!(" CHECK (typeof({name}) <> 'real')")),
        5 => definition.push_str(" COLLATE NOCASE"),
        6 if !strict => definition.push_str(&format!(" DEFAULT {}", plain_literal(random))),
        7..=9 => {
            let mut parents = schema.of(&[Kind::Rowid, Kind::WithoutRowid]);
            // Others are refused when they are used.
            parents.retain(|parent| parent.has_simple_key || random.one_in(20));
            if !parents.is_empty() {
                let parent = &random.pick(&parents).name;
                let actions = ["CASCADE", "SET NULL", "SET DEFAULT", "RESTRICT", "NO ACTION"];
                let (delete, update) = (random.pick(&actions), random.pick(&actions));
                let deferred = random.pick(&["", " DEFERRABLE INITIALLY DEFERRED"]);
                definition
                    .push_str(&format!(" REFERENCES {parent}(id) ON DELETE {delete} ON UPDATE {update}{deferred}"));
            }
        }
        _ => {}
    }
    definition
}

fn create_index(random: &mut Random, schema: &Schema) -> Step {
    let Some(table) = schema.plain(random) else { return create_table(random, schema) };
    if schema.indices.len() >= MOST_INDICES {
        return drop_object(random, schema);
    }
    let taken: Vec<&str> = schema.indices.iter().map(String::as_str).collect();
    let name = free_name(random, &taken, "qi");
    let names = table.column_names();
    let keys: Vec<String> = (0..1 + random.below(3))
        .map(|_| {
            let key = match random.below(3) {
                0 => schema_expression(random, &names),
                _ => random.pick(&names).to_owned(),
            };
            format!("{key}{}", random.pick(&["", " DESC", " COLLATE NOCASE"]))
        })
        .collect();
    let unique = if random.one_in(8) { "UNIQUE " } else { "" };
    let partial = match random.below(3) {
        0 => format!(" WHERE {} IS NOT NULL", random.pick(&names)),
        1 => format!(" WHERE {} > {}", random.pick(&names), plain_literal(random)),
        _ => String::new(),
    };
    format!("CREATE {unique}INDEX {name} ON {}({}){partial}", table.name, keys.join(", ")).into()
}

fn create_view(random: &mut Random, schema: &Schema) -> Step {
    let Some(table) = schema.plain(random) else { return create_table(random, schema) };
    if schema.tables.len() >= MOST_TABLES {
        return drop_object(random, schema);
    }
    let name = free_name(random, &schema.names(), "qv");
    let names = table.column_names();
    let last = names[names.len() - 1];
    match random.below(3) {
        0 => format!("CREATE VIEW {name}(id, c0, total) AS SELECT id, {last}, count(*) OVER () FROM {}", table.name)
            .into(),
        1 => format!(
            "CREATE VIEW {name} AS SELECT id, quote({last}) AS c0 FROM {} WHERE {} IS NOT NULL",
            table.name,
            random.pick(&names)
        )
        .into(),
        _ => format!("CREATE VIEW {name} AS SELECT * FROM {}", table.name).into(),
    }
}

fn create_trigger(random: &mut Random, schema: &Schema) -> Step {
    let tables = schema.of(&[Kind::Rowid, Kind::WithoutRowid, Kind::View]);
    if tables.is_empty() || schema.triggers.len() >= MOST_TRIGGERS {
        return drop_object(random, schema);
    }
    let table = random.pick(&tables);
    let taken: Vec<&str> = schema.triggers.iter().map(String::as_str).collect();
    let name = free_name(random, &taken, "qg");
    let time = match table.kind {
        Kind::View => "INSTEAD OF",
        _ => random.pick(&["BEFORE", "AFTER"]),
    };
    let event = random.pick(&["INSERT", "UPDATE", "DELETE", "UPDATE OF id"]);
    let row = if event == "DELETE" { "old" } else { "new" };
    let columns = table.column_names();
    let column = random.pick(&columns);
    let when = match random.below(3) {
        0 => format!(" WHEN {row}.{column} IS NOT NULL"),
        1 => format!(" WHEN {row}.id % 2 = {}", random.below(2)),
        _ => String::new(),
    };
    let target = schema.plain(random).unwrap_or(table);
    let into = target.settable();
    let into = into[into.len() - 1].name.as_str();
    let body = match random.below(8) {
        0 => format!("SELECT RAISE(ABORT, 'no {name}') WHERE {row}.id % 5 = 0;"),
        1 => format!("SELECT RAISE(IGNORE) WHERE {row}.id % 4 = 0;"),
        2 => format!("SELECT RAISE(FAIL, 'stopped at ' || {row}.id) WHERE {row}.id % 7 = 0;"),
        3 => format!("DELETE FROM {} WHERE id = {row}.id + 1;", target.name),
        4..=5 => format!("UPDATE {} SET {into} = {row}.{column} WHERE id = {row}.id + 2;", target.name),
        _ => format!("INSERT OR IGNORE INTO {}(id, {into}) VALUES ({row}.id + 100, {row}.{column});", target.name),
    };
    format!("CREATE TRIGGER {name} {time} {event} ON {} {when} BEGIN {body} END", table.name).into()
}

fn alter_table(random: &mut Random, schema: &Schema) -> Step {
    let Some(table) = schema.plain(random) else { return create_table(random, schema) };
    let names = table.column_names();
    let column = random.pick(&names);
    let change = match random.below(6) {
        0 => {
            let new = free_name(random, &schema.names(), &table.name[..2]);
            format!("RENAME TO {new}")
        }
        1 if column != "id" => {
            let new = free_name(random, &names, "d");
            format!("RENAME COLUMN {column} TO {new}")
        }
        2 if column != "id" => format!("DROP COLUMN {column}"),
        3 => {
            let new = free_name(random, &names, "e");
            format!("ADD COLUMN {new} AS ({}) VIRTUAL", schema_expression(random, &names))
        }
        _ if names.len() > 9 => format!("DROP COLUMN {}", names[names.len() - 1]),
        _ => {
            let new = free_name(random, &names, "e");
            let rest = random.pick(&["", " NOT NULL DEFAULT 7", " DEFAULT 'seven'", " CHECK (length(id) < 9)"]);
            format!("ADD COLUMN {new} {}{rest}", random.pick(&["INT", "TEXT", "BLOB"]))
        }
    };
    format!("ALTER TABLE {} {change}", table.name).into()
}

fn drop_object(random: &mut Random, schema: &Schema) -> Step {
    let (indices, triggers) = (&schema.indices, &schema.triggers);
    match random.below(4) {
        0..=1 if !indices.is_empty() => {
            format!("DROP INDEX {}", indices[random.below(indices.len() as u64) as usize]).into()
        }
        2 if !triggers.is_empty() => {
            format!("DROP TRIGGER {}", triggers[random.below(triggers.len() as u64) as usize]).into()
        }
        _ if schema.tables.is_empty() => "DROP TABLE IF EXISTS qt0".into(),
        _ => {
            let table = &schema.tables[random.below(schema.tables.len() as u64) as usize];
            format!("DROP {} {}", if table.kind == Kind::View { "VIEW" } else { "TABLE" }, table.name).into()
        }
    }
}

fn maintenance(random: &mut Random, schema: &Schema) -> Step {
    match random.below(8) {
        0 => format!("PRAGMA user_version = {}", random.below(1000)).into(),
        1..=2 => format!("PRAGMA incremental_vacuum({})", 1 + random.below(20)).into(),
        3 => "PRAGMA defer_foreign_keys = 1".into(),
        4 => "PRAGMA foreign_key_check".into(),
        5 => "PRAGMA application_id = 77".into(),
        6 => "REINDEX".into(),
        _ => match schema.plain(random) {
            Some(table) => format!("REINDEX {}", table.name).into(),
            None => "PRAGMA freelist_count".into(),
        },
    }
}

fn savepoint(random: &mut Random, savepoints: &mut SavePoints) -> Step {
    if savepoints.0.is_empty() || random.one_in(3) {
        let name = format!("s{}", random.below(5));
        savepoints.0.push(name.clone());
        return format!("SAVEPOINT {name}").into();
    }
    let name = savepoints.0[random.below(savepoints.0.len() as u64) as usize].clone();
    // A name stands for the newest savepoint that has it.
    let at = savepoints.0.iter().rposition(|open| *open == name).expect("it was picked from them");
    if random.one_in(3) {
        savepoints.0.truncate(at);
        format!("RELEASE {name}").into()
    } else {
        savepoints.0.truncate(at + 1);
        format!("ROLLBACK TO {name}").into()
    }
}

/// Statements that SQLite refuses, each in its own words.
fn wrong(random: &mut Random, schema: &Schema) -> Step {
    let names = schema.names();
    let table = if names.is_empty() { "qt0" } else { random.pick(&names) };
    match random.below(16) {
        0 => "SELEC 1".into(),
        1 => format!("SELECT nothing FROM {table}").into(),
        2 => format!("SELECT * FROM {table} WHERE 'unterminated").into(),
        3 => "INSERT INTO nowhere VALUES (1)".into(),
        4 => format!("CREATE TABLE {table}(x)").into(),
        5 => format!("INSERT INTO {table} SELECT 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13").into(),
        6 => "SELECT abs(-9223372036854775808)".into(),
        7 => "SELECT json('{\"a\":')".into(),
        8 => "SELECT zeroblob(2000000000)".into(),
        9 => "RELEASE nosuchsavepoint".into(),
        10 => "BEGIN".into(),
        11 => "VACUUM".into(),
        12 => "CREATE TABLE broken(a, b AS (c))".into(),
        13 => "SELECT 1 UNION SELECT 1, 2".into(),
        14 => "SELECT count(*) OVER (ORDER BY 1) FROM (SELECT 1) WHERE row_number() OVER () = 1".into(),
        _ => format!("INSERT INTO {table}(id) VALUES (1), (2, 3)").into(),
    }
}

fn virtual_table(random: &mut Random, schema: &Schema) -> Step {
    let tables = schema.of(&[Kind::FullText, Kind::RTree]);
    if tables.is_empty() {
        return insert(random, schema);
    }
    let table = random.pick(&tables);
    let name = &table.name;
    let mut writer = Writer::new(random, Vec::new());
    let id = writer.random.below(60);
    let sql = if table.kind == Kind::RTree {
        let (x, y) = (writer.random.below(100), writer.random.below(100));
        let (wide, high) = (writer.random.below(20) as i64 - 1, writer.random.below(20));
        match writer.random.below(6) {
            0..=2 => {
                let note = writer.literal();
                format!(
                    "INSERT OR REPLACE INTO {name} VALUES ({id}, {x}.25, {}.5, {y}, {}, {note})",
                    x as i64 + wide,
                    y + high
                )
            }
            3 => format!("INSERT INTO {name}(id, x0, x1, y0, y1) VALUES ({id}, {x}, {x}, {y}, {y})"),
            4 => format!("UPDATE {name} SET x1 = x1 + {high}, note = 'moved' WHERE id < {id}"),
            _ => format!("DELETE FROM {name} WHERE x0 > {x} AND y1 < {y}"),
        }
    } else {
        let title = sentence(writer.random);
        let note = sentence(writer.random).repeat(1 + writer.random.below(40) as usize);
        let (title, note) = (writer.bind(title.into()), writer.bind(note.into()));
        match writer.random.below(12) {
            0..=4 => format!("INSERT INTO {name}(rowid, title, body, note) VALUES ({id}, {title}, {title}, {note})"),
            5..=6 => format!("INSERT INTO {name}(title, note) VALUES ({title}, {note})"),
            7 => format!("UPDATE {name} SET title = {title}, note = {note} WHERE rowid = {id}"),
            8 => format!("DELETE FROM {name} WHERE rowid BETWEEN {id} AND {}", id + 5),
            9 => {
                let word = word(writer.random);
                format!("DELETE FROM {name} WHERE {name} MATCH '{word} OR title:{word}*'")
            }
            10 => format!("INSERT INTO {name}({name}, rank) VALUES ('merge', {})", 1 + id),
            _ => {
                let command = writer.random.pick(&["optimize", "rebuild", "integrity-check", "delete-all"]);
                format!("INSERT INTO {name}({name}) VALUES ('{command}')")
            }
        }
    };
    writer.finish(sql)
}

/// Which rows collide, and what becomes of them then.
fn conflict(random: &mut Random) -> &'static str {
    match random.below(14) {
        0 => " OR REPLACE",
        1 => " OR IGNORE",
        2 => " OR FAIL",
        3 => " OR ABORT",
        4 if random.one_in(4) => " OR ROLLBACK",
        _ => "",
    }
}

fn returning(writer: &mut Writer<'_>, columns: &[&str]) -> String {
    match writer.random.below(6) {
        0 => " RETURNING *".into(),
        1 => format!(" RETURNING id, {} AS made", writer.expression(columns, 2)),
        _ => String::new(),
    }
}

/// Tables that are written to: views among them, now and then.
fn target<'a>(random: &mut Random, schema: &'a Schema) -> Option<&'a Table> {
    let views = schema.of(&[Kind::View]);
    if !views.is_empty() && random.one_in(40) {
        return Some(random.pick(&views));
    }
    schema.plain(random)
}

fn insert(random: &mut Random, schema: &Schema) -> Step {
    let Some(table) = target(random, schema) else { return create_table(random, schema) };
    let mut writer = Writer::new(random, schema.names());
    let columns = table.column_names();
    if writer.random.one_in(25) {
        return format!("INSERT INTO {} DEFAULT VALUES", table.name).into();
    }
    let mut given = table.settable();
    if given.len() > 2 && writer.random.one_in(3) {
        given.truncate(2);
    }
    let conflict = conflict(writer.random);
    let rows: Vec<String> = (0..1 + writer.random.below(4))
        .map(|_| {
            let values: Vec<String> = given.iter().map(|column| writer.value_for(column)).collect();
            format!("({})", values.join(", "))
        })
        .collect();
    let names: Vec<&str> = given.iter().map(|column| column.name.as_str()).collect();
    let upsert = if conflict.is_empty() && names.len() > 1 && writer.random.one_in(4) {
        let last = names[names.len() - 1];
        match writer.random.below(3) {
            0 => " ON CONFLICT DO NOTHING".into(),
            1 => format!(" ON CONFLICT(id) DO UPDATE SET {last} = excluded.{last}"),
            _ => {
                let columns: Vec<String> = names.iter().map(|name| format!("excluded.{name}")).collect();
                let columns: Vec<&str> = columns.iter().map(String::as_str).collect();
                let value = writer.expression(&columns, 1);
                format!(" ON CONFLICT DO UPDATE SET {last} = {value} WHERE excluded.id % 3 > 0")
            }
        }
    } else {
        String::new()
    };
    let returning = returning(&mut writer, &columns);
    let sql = format!(
        "INSERT{conflict} INTO {}({}) VALUES {}{upsert}{returning}",
        table.name,
        names.join(", "),
        rows.join(", ")
    );
    writer.finish(sql)
}

fn insert_select(random: &mut Random, schema: &Schema) -> Step {
    let (Some(table), Some(from)) = (schema.plain(random), schema.plain(random)) else {
        return create_table(random, schema);
    };
    let mut writer = Writer::new(random, schema.names());
    let settable = table.settable();
    let into = settable[settable.len() - 1].name.as_str();
    let conflict = match writer.random.below(3) {
        0 => conflict(writer.random),
        _ => " OR IGNORE",
    };
    let first = writer.random.below(80);
    let sql = if writer.random.one_in(2) {
        let value = writer.expression(&["i"], 2);
        let count = if writer.random.one_in(4) { writer.random.below(200) } else { writer.random.below(20) };
        format!(
            "WITH RECURSIVE n(i) AS (VALUES ({first}) UNION ALL SELECT i + 1 FROM n WHERE i < {}) INSERT{conflict} INTO {}(id, {into}) SELECT i, {value} FROM n",
            first + count,
            table.name
        )
    } else {
        let columns = from.column_names();
        let value = writer.expression(&columns, 2);
        format!(
            "INSERT{conflict} INTO {}(id, {into}) SELECT id + {first}, {value} FROM {} ORDER BY id LIMIT 30",
            table.name, from.name
        )
    };
    let mut step = writer.finish(sql);
    if into == "id" {
        step = format!("INSERT OR IGNORE INTO {}(id) VALUES ({first})", table.name).into();
    }
    step
}

fn update(random: &mut Random, schema: &Schema) -> Step {
    let Some(table) = target(random, schema) else { return create_table(random, schema) };
    let mut writer = Writer::new(random, schema.names());
    let columns = table.column_names();
    let settable = table.settable();
    let conflict = conflict(writer.random);
    let set: Vec<String> = (0..1 + writer.random.below(2))
        .map(|_| {
            let column = settable[writer.random.below(settable.len() as u64) as usize];
            let value = match (column.name.as_str(), writer.random.below(3)) {
                ("id", 0) => "id + 1".into(),
                ("id", _) => "id".into(),
                (_, 0) => writer.value_for(column),
                _ if column.parent.is_some() => writer.value_for(column),
                _ => writer.expression(&columns, 2),
            };
            format!("{} = {value}", column.name)
        })
        .collect();
    let from = match schema.plain(writer.random) {
        Some(other) if table.is_plain() && writer.random.one_in(8) => {
            // One row for each row that is changed, whatever the plan.
            let set = settable[settable.len() - 1].name.as_str();
            if set != "id" {
                let sql = format!(
                    "UPDATE {} SET {set} = o.total FROM (SELECT id AS oid, count(*) AS total FROM {} GROUP BY id) AS o WHERE id = oid",
                    table.name, other.name
                );
                return sql.into();
            }
            String::new()
        }
        _ => String::new(),
    };
    let condition = if writer.random.one_in(10) { "1".to_owned() } else { writer.condition(&columns) };
    let returning = returning(&mut writer, &columns);
    let sql = format!("UPDATE{conflict} {} SET {}{from} WHERE {condition}{returning}", table.name, set.join(", "));
    writer.finish(sql)
}

fn delete(random: &mut Random, schema: &Schema) -> Step {
    let Some(table) = target(random, schema) else { return create_table(random, schema) };
    let mut writer = Writer::new(random, schema.names());
    let columns = table.column_names();
    if writer.random.one_in(15) {
        return format!("DELETE FROM {}", table.name).into();
    }
    let condition = if writer.random.one_in(3) {
        format!("id % 3 = {}", writer.random.below(3))
    } else {
        writer.condition(&columns)
    };
    let returning = returning(&mut writer, &columns);
    let sql = format!("DELETE FROM {} WHERE {condition}{returning}", table.name);
    writer.finish(sql)
}
