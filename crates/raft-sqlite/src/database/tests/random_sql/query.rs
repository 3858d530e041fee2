//! Queries. Their rows are the same whatever the plan; the order of the rows is not.

use super::expression::{Writer, word};
use super::schema::{Kind, Schema};
use super::{Random, Step};

pub fn query(random: &mut Random, schema: &Schema) -> Step {
    let names = schema.names();
    if names.is_empty() || random.one_in(8) {
        return about_everything(random);
    }
    let table = schema.tables.get(random.below(names.len() as u64) as usize).expect("it is below");
    let name = table.name.as_str();
    match table.kind {
        Kind::FullText => {
            let (word, other) = (word(random), word(random));
            let search = match random.below(6) {
                0 => format!("{word} AND NOT {other}"),
                1 => format!("title:{word}* OR {other}"),
                2 => format!("NEAR({word} {other}, 3)"),
                3 => format!("\"{word} {other}\""),
                4 => format!("^{word}"),
                _ => word,
            };
            return match random.below(3) {
                0 => format!("SELECT rowid, rank FROM {name} WHERE {name} MATCH '{search}'").into(),
                1 => format!("SELECT highlight({name}, 0, '<', '>') FROM {name}('{search}')").into(),
                _ => format!("SELECT * FROM {name}").into(),
            };
        }
        Kind::RTree => {
            let (x, y) = (random.below(100), random.below(100));
            return format!("SELECT * FROM {name} WHERE x0 >= {x} AND x1 <= {} AND y0 < {y}", x + 40).into();
        }
        _ => {}
    }
    let columns = table.column_names();
    let mut writer = Writer::new(random, names.clone());
    let sql = match writer.random.below(9) {
        0..=1 => format!("SELECT * FROM {name}"),
        2 => {
            let (value, condition) = (writer.expression(&columns, 3), writer.condition(&columns));
            format!("SELECT id, {value} FROM {name} WHERE {condition}")
        }
        3 => {
            let key = writer.random.pick(&columns);
            format!(
                "SELECT quote({key}), count(*), max(quote(id)), group_concat(quote(id) ORDER BY quote(id)) FROM {name} GROUP BY quote({key}) HAVING count(*) < 9"
            )
        }
        4 => match schema.plain(writer.random) {
            Some(other) => {
                let join = writer.random.pick(&["JOIN", "LEFT JOIN", "RIGHT JOIN", "FULL JOIN"]);
                let column = writer.random.pick(&columns);
                format!("SELECT a.id, b.id FROM {name} AS a {join} {} AS b ON a.{column} = b.id", other.name)
            }
            None => format!("SELECT count(*) FROM {name}"),
        },
        5 => {
            let all = columns.iter().map(|column| format!("quote({column})")).collect::<Vec<_>>().join(", ");
            let key = writer.random.pick(&columns);
            format!(
                "SELECT {all}, row_number() OVER w, lag(quote(id)) OVER w, sum(length({key})) OVER w FROM {name} WINDOW w AS (PARTITION BY typeof({key}) ORDER BY {all})"
            )
        }
        6 => {
            let other = writer.random.pick(&names);
            let operator = writer.random.pick(&["UNION", "UNION ALL", "EXCEPT", "INTERSECT"]);
            format!("SELECT quote(id) FROM {name} {operator} SELECT count(*) FROM {other}")
        }
        7 => format!(
            "WITH RECURSIVE chain(id, depth) AS (SELECT id, 0 FROM {name} WHERE id < 5 UNION SELECT t.id, depth + 1 FROM {name} AS t, chain WHERE t.id = chain.id + 1 AND depth < 20) SELECT quote(id), depth FROM chain"
        ),
        _ => {
            let all = columns.iter().map(|column| format!("quote({column})")).collect::<Vec<_>>().join(", ");
            let (limit, offset) = (writer.random.below(9), writer.random.below(9));
            format!("SELECT {all} FROM {name} ORDER BY {all} LIMIT {limit} OFFSET {offset}")
        }
    };
    writer.finish(sql)
}

/// Of the schema and the file: here, the pages themselves show. (Not `integrity_check`: FTS5 compares with what a connection has read before,
/// also when another connection has written since.)
fn about_everything(random: &mut Random) -> Step {
    random
        .pick(&[
            "SELECT type, name, tbl_name, rootpage, sql FROM sqlite_schema",
            "SELECT name, type, wr, strict FROM pragma_table_list WHERE schema = 'main'",
            "PRAGMA foreign_key_check",
            "PRAGMA page_count",
            "PRAGMA freelist_count",
            "PRAGMA user_version",
            "PRAGMA auto_vacuum",
            // Which of its pages a table has where depends on the order in which a connection came to know the indices.
            "SELECT name, pagetype, count(*), sum(ncell), sum(payload), sum(unused), max(mx_payload) FROM dbstat GROUP BY name, pagetype",
            "SELECT m.name, c.* FROM sqlite_schema AS m, pragma_table_xinfo(m.name) AS c",
            "SELECT m.name, i.* FROM sqlite_schema AS m, pragma_index_list(m.name) AS i",
        ])
        .into()
}
