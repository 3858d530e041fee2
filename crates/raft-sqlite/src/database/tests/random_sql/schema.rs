//! What a connection has at the moment.

use rusqlite::Connection;

use super::Random;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    Rowid,
    WithoutRowid,
    FullText,
    RTree,
    View,
}

#[derive(Clone, Debug)]
pub struct Column {
    pub name: String,
    pub declared: String,
    pub generated: bool,
    /// The table that it refers to.
    pub parent: Option<String>,
}

#[derive(Clone, Debug)]
pub struct Table {
    pub name: String,
    pub kind: Kind,
    pub columns: Vec<Column>,
    /// `id` alone is the key: others may refer to it.
    pub has_simple_key: bool,
}

impl Table {
    pub fn column_names(&self) -> Vec<&str> {
        self.columns.iter().map(|column| column.name.as_str()).collect()
    }

    /// Columns that a statement may set.
    pub fn settable(&self) -> Vec<&Column> {
        self.columns.iter().filter(|column| !column.generated).collect()
    }

    pub fn is_plain(&self) -> bool {
        matches!(self.kind, Kind::Rowid | Kind::WithoutRowid)
    }
}

/// The objects whose names begin with `q`.
#[derive(Clone, Debug, Default)]
pub struct Schema {
    pub tables: Vec<Table>,
    pub indices: Vec<String>,
    pub triggers: Vec<String>,
}

impl Schema {
    pub fn read(connection: &Connection) -> rusqlite::Result<Schema> {
        let mut schema = Schema::default();
        let mut objects =
            connection.prepare_cached("SELECT type, name FROM sqlite_schema WHERE name GLOB 'q*' ORDER BY name")?;
        let objects =
            objects.query_map([], |row| Ok((row.get::<_, String>(0)?, row.get::<_, String>(1)?)))?.collect::<Vec<_>>();
        for object in objects {
            let (kind, name) = object?;
            match kind.as_str() {
                "index" => schema.indices.push(name),
                "trigger" => schema.triggers.push(name),
                // Shadow tables of the virtual ones have longer names.
                _ if name.contains('_') => {}
                _ => schema.tables.extend(table(connection, name)?),
            }
        }
        Ok(schema)
    }

    pub fn of(&self, kinds: &[Kind]) -> Vec<&Table> {
        self.tables.iter().filter(|table| kinds.contains(&table.kind)).collect()
    }

    /// Some table that rows are kept in as they are.
    pub fn plain(&self, random: &mut Random) -> Option<&Table> {
        let tables = self.of(&[Kind::Rowid, Kind::WithoutRowid]);
        (!tables.is_empty()).then(|| random.pick(&tables))
    }

    pub fn names(&self) -> Vec<&str> {
        self.tables.iter().map(|table| table.name.as_str()).collect()
    }
}

/// None: a view or a table that is broken, as SQLite allows them to be.
fn table(connection: &Connection, name: String) -> rusqlite::Result<Option<Table>> {
    let kind = match name.as_bytes().get(1) {
        Some(b'w') => Kind::WithoutRowid,
        Some(b'f') => Kind::FullText,
        Some(b'r') => Kind::RTree,
        Some(b'v') => Kind::View,
        _ => Kind::Rowid,
    };
    let mut columns = connection.prepare_cached(
        r#"SELECT name, type, hidden, pk, (SELECT "table" FROM pragma_foreign_key_list(?1) WHERE "from" = name) FROM pragma_table_xinfo(?1)"#,
    )?;
    let mut keys = Vec::new();
    let read = columns.query_map([&name], |row| {
        let (hidden, key): (i64, i64) = (row.get(2)?, row.get(3)?);
        let column = Column { name: row.get(0)?, declared: row.get(1)?, generated: hidden >= 2, parent: row.get(4)? };
        if key > 0 {
            keys.push(column.name.clone());
        }
        Ok((hidden, column))
    })?;
    let columns: rusqlite::Result<Vec<(i64, Column)>> = read.collect();
    let Ok(columns) = columns else { return Ok(None) };
    let has_simple_key = keys == ["id"];
    let columns: Vec<Column> =
        columns.into_iter().filter(|(hidden, _)| *hidden != 1).map(|(_, column)| column).collect();
    Ok((!columns.is_empty()).then_some(Table { name, kind, columns, has_simple_key }))
}
