//! Every example runs to its end.

#[test]
fn embedded() {
    let test = std::env::current_exe().expect("a test has a path");
    // target/PROFILE/deps/TEST -> target/PROFILE/examples/embedded, which cargo builds with the tests.
    let profile = test.parent().and_then(|deps| deps.parent()).expect("a test lies in target/PROFILE/deps");
    let example = profile.join("examples/embedded");
    let output = std::process::Command::new(&example).output().expect("the example is built with the tests");
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{text}\n{}", String::from_utf8_lossy(&output.stderr));
    assert!(text.contains("is a plain SQLite file with 3 words"), "{text}");
}
