//! Every example runs to its end.

#[test]
fn metrics() {
    let text = run("metrics");
    assert!(text.contains("raft_sqlite_log_fsync_duration_seconds_count"), "{text}");
}

#[test]
fn embedded() {
    let text = run("embedded");
    assert!(text.contains("is a plain SQLite file with 3 words"), "{text}");
}

#[test]
fn counter() {
    let text = run("counter");
    let stands = text.split("the counter stands at ").nth(1).and_then(|count| count.trim().parse::<i64>().ok());
    assert!(stands.is_some_and(|count| (100..=150).contains(&count)), "{text}");
}

#[test]
fn jobs() {
    let text = run("jobs");
    assert!(text.contains("27 squares, 3 given up, 0 jobs left"), "{text}");
}

#[test]
fn http() {
    let text = run("http");
    for line in
        ["PUT /kv/greeting: 204", "GET /kv/greeting: 200 hello", "DELETE /kv/greeting: 204", "GET /kv/greeting: 404"]
    {
        assert!(text.contains(line), "{text}");
    }
}

#[test]
fn synchronous() {
    let text = run("synchronous");
    assert!(text.contains("Zermatt: -2.5 degrees"), "{text}");
}

/// What an example prints.
fn run(name: &str) -> String {
    let test = std::env::current_exe().expect("a test has a path");
    // target/PROFILE/deps/TEST -> target/PROFILE/examples/NAME, which cargo builds with the tests.
    let profile = test.parent().and_then(|deps| deps.parent()).expect("a test lies in target/PROFILE/deps");
    let example = profile.join("examples").join(name);
    let output = std::process::Command::new(&example).output().expect("the example is built with the tests");
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(output.status.success(), "{text}\n{}", String::from_utf8_lossy(&output.stderr));
    text
}
