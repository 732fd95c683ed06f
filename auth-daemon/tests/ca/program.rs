//! The program `auth-daemon ca`, and its operator's requests.

use std::{
    fs,
    io::{BufRead, BufReader},
    os::unix::process::ExitStatusExt,
    path::Path,
    process::{Child, Command, Output, Stdio},
    sync::mpsc,
    time::{Duration, Instant},
};

use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};

use crate::harness::{NAME, write_config};

const PROGRAM: &str = env!("CARGO_BIN_EXE_auth-daemon");

pub(crate) struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Starts a CA, and waits until it says that it has started. Returns that line of its log, and those after it.
pub(crate) fn start_logged(config: &Path) -> (Running, String, mpsc::Receiver<String>) {
    let mut child = Command::new(PROGRAM)
        .args(["ca", "--config"])
        .arg(config)
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut log = BufReader::new(child.stderr.take().unwrap()).lines();
    let running = Running(child);
    let started = log
        .by_ref()
        .map_while(Result::ok)
        .find(|line| line.contains("CA started"));
    let started = started.expect("it has ended");
    let (lines, later) = mpsc::channel();
    std::thread::spawn(move || {
        for line in log.map_while(Result::ok) {
            let _ = lines.send(line);
        }
    });
    (running, started, later)
}

fn start(config: &Path) -> Running {
    start_logged(config).0
}

fn ask(arguments: &[&str], config: &Path) -> Output {
    let output = Command::new(PROGRAM)
        .arg("ca")
        .args(arguments)
        .arg("--config")
        .arg(config)
        .output();
    output.unwrap()
}

pub(crate) fn answer(arguments: &[&str], config: &Path) -> String {
    let output = ask(arguments, config);
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{arguments:?}: {error}");
    String::from_utf8(output.stdout).unwrap()
}

fn refusal(arguments: &[&str], config: &Path) -> String {
    let output = ask(arguments, config);
    assert!(!output.status.success(), "{arguments:?}");
    String::from_utf8(output.stderr).unwrap()
}

#[test]
fn an_operator_asks_the_ca() {
    let folder = tempfile::tempdir().unwrap();
    let config = write_config(folder.path(), "127.0.0.1:0", "");
    let nobody = refusal(&["status"], &config);
    assert!(nobody.contains("no CA answers at"), "{nobody}");

    let mut ca = start(&config);
    let status = answer(&["status", "--json"], &config);
    let status: serde_json::Value = serde_json::from_str(&status).unwrap();
    assert_eq!(
        (&status["leader"], &status["phase"]),
        (&true.into(), &"steady".into())
    );
    assert!(answer(&["status"], &config).contains("ROOTS (1)"));

    let revoked = answer(
        &["revoke", "--node", "b", "--reason", "keyCompromise"],
        &config,
    );
    assert!(revoked.contains("node b is revoked"), "{revoked}");
    answer(
        &["revoke", "--identity", "spiffe://cluster.local/ns/a/sa/b"],
        &config,
    );
    let table = answer(&["status"], &config);
    assert!(
        table.contains("REVOKED NODES (1)\n  b  keyCompromise"),
        "{table}"
    );
    answer(&["unrevoke", "--node", "b"], &config);
    assert!(answer(&["status"], &config).contains("REVOKED NODES (0)"));
    assert!(
        answer(&["rotate-root"], &config).contains("root"),
        "the phase in words"
    );

    let token = answer(&["token", "create", "--node", "vm-1"], &config);
    assert!(token.starts_with("auth-daemon-join-") && token.lines().count() == 1);
    let listed = answer(&["token", "list"], &config);
    assert!(listed.starts_with("vm-1  until 2") && !listed.contains(token.trim()));
    assert!(answer(&["status"], &config).contains("UNUSED JOIN TOKENS (1)\n  vm-1  until 2"));
    answer(&["token", "delete", "--node", "vm-1"], &config);
    assert_eq!(answer(&["token", "list"], &config), "");
    for (arguments, expected) in [
        (&["token", "delete", "--node", "vm-1"][..], "no token"),
        (&["token", "create", "--node", "a"], "attestation.tokens"),
        (
            &["token", "create", "--node", "vm", "--lifetime", "2h"],
            "is not between",
        ),
        (&["revoke", "--serial", "xyz"], "serial"),
        (&["revoke", "--identity", "web"], "spiffe://"),
        (
            &["revoke", "--identity", "spiffe://other/ns/a/sa/b"],
            "trust domain",
        ),
        (
            &["revoke", "--node", "a", "--reason", "spite"],
            "is none of unspecified",
        ),
        (&["revoke"], "--serial"),
        (
            &["revoke", "--node", ""],
            "one of serial, identity and node",
        ),
        (
            &["revoke", "--node", "a", "--serial", "1"],
            "cannot be used with",
        ),
        (&["rotate-root"], "refuses"),
    ] {
        let error = refusal(arguments, &config);
        assert!(error.contains(expected), "{arguments:?}: {error}");
    }

    let second = Command::new(PROGRAM)
        .args(["ca", "--config"])
        .arg(&config)
        .output()
        .unwrap();
    let error = String::from_utf8_lossy(&second.stderr);
    assert!(
        !second.status.success() && error.contains("another CA is running"),
        "{error}"
    );

    kill(
        Pid::from_raw(i32::try_from(ca.0.id()).unwrap()),
        Signal::SIGTERM,
    )
    .unwrap();
    let start = Instant::now();
    let status = loop {
        if let Some(status) = ca.0.try_wait().unwrap() {
            break status;
        }
        assert!(
            start.elapsed() < Duration::from_secs(30),
            "it does not stop"
        );
        std::thread::sleep(Duration::from_millis(20));
    };
    assert_eq!(status.code(), Some(0));
}

#[test]
fn leaves_no_core_dump_with_its_key() {
    let folder = tempfile::tempdir().unwrap();
    // Runs a program that may leave a core dump in `folder`, and kills it as a crash does.
    let dumps = |arguments: &[&str], log: &str| {
        let mut child = Command::new("sh")
            .args(["-c", "ulimit -c unlimited; exec \"$0\" \"$@\""])
            .args(arguments)
            .current_dir(folder.path())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let lines = BufReader::new(child.stderr.take().unwrap()).lines();
        let started = lines.map_while(Result::ok).find(|line| line.contains(log));
        assert!(started.is_some(), "it has ended");
        let pid = Pid::from_raw(i32::try_from(child.id()).unwrap());
        kill(pid, Signal::SIGABRT).unwrap();
        let status = child.wait().unwrap();
        assert_eq!(status.signal(), Some(Signal::SIGABRT as i32));
        status.core_dumped()
    };
    if !dumps(&["sh", "-c", "echo up >&2; exec sleep 60"], "up") {
        println!("SKIPPED leaves_no_core_dump_with_its_key: this machine dumps no core");
        return;
    }
    let config = write_config(folder.path(), "127.0.0.1:0", "");
    let config = config.to_str().unwrap();
    assert!(!dumps(&[PROGRAM, "ca", "--config", config], "CA started"));
}

#[test]
fn a_bad_configuration_is_shown_whole() {
    let folder = tempfile::tempdir().unwrap();
    let config = write_config(folder.path(), "127.0.0.1:0", "mood: good\n");
    let text = fs::read_to_string(&config).unwrap();
    fs::write(&config, text.replace(NAME, "'c a'")).unwrap();
    let output = Command::new(PROGRAM)
        .args(["ca", "--config"])
        .arg(&config)
        .output()
        .unwrap();
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(!output.status.success());
    assert!(
        error.contains("mood: there is no such field") && error.contains("serverNames[0]"),
        "{error}"
    );

    let config = write_config(folder.path(), "127.0.0.1:0", "");
    fs::write(folder.path().join("a"), "short").unwrap();
    fs::remove_file(folder.path().join("b")).unwrap();
    let output = Command::new(PROGRAM)
        .args(["ca", "--config"])
        .arg(&config)
        .output()
        .unwrap();
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(
        error.contains("tokens[0].tokenFile") && error.contains("tokens[1].tokenFile"),
        "{error}"
    );
}
