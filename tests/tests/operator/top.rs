//! `auth-daemon top` in a real terminal: tmux holds the screen and presses the keys.

use std::path::PathBuf;

use mesh_tests::{Node, TIMEOUT, auth_daemon, eventually};

use crate::common::lifecycle_pair::{Echoing, MARKER, SERVICES, call, echoes};

/// A terminal on a node. Dropping it ends the programs in it.
struct Terminal<'a> {
    node: &'a Node,
    socket: PathBuf,
}

impl<'a> Terminal<'a> {
    /// Starts `auth-daemon` with these arguments in a terminal, whose screen says afterwards how it ended. `None` if tmux is not
    /// installed.
    fn start(node: &'a Node, arguments: &str) -> Option<Self> {
        let socket = node.folder().join("tmux");
        let terminal = Self { node, socket };
        let program = auth_daemon().unwrap();
        let shell = format!(
            "{} {arguments}; echo it ended with $?; exec cat",
            program.display()
        );
        let start = ["new-session", "-d", "-x", "150", "-y", "20", &shell];
        terminal
            .node
            .command("tmux")
            .unwrap()
            .arg("-V")
            .output()
            .ok()?;
        terminal.tmux(&start);
        Some(terminal)
    }

    /// Runs tmux, and returns what it prints.
    fn tmux(&self, arguments: &[&str]) -> String {
        let mut command = self.node.command("tmux").unwrap();
        command
            .args(["-u", "-f", "/dev/null", "-S"])
            .arg(&self.socket);
        let output = command.args(arguments).output().unwrap();
        assert!(output.status.success(), "tmux {arguments:?}: {output:?}");
        String::from_utf8(output.stdout).unwrap()
    }

    fn press(&self, keys: &[&str]) {
        self.tmux(&[&["send-keys"], keys].concat());
    }

    /// Waits until the screen, with runs of spaces as one, is as `is_so` wants it, and returns it.
    fn shows(&self, what: &str, is_so: impl Fn(&str) -> bool) -> String {
        let mut last = String::new();
        let found = eventually(TIMEOUT, what, || {
            let screen = self.tmux(&["capture-pane", "-p"]);
            let lines = screen.lines().map(|line| {
                let words: Vec<_> = line.split_whitespace().collect();
                words.join(" ") + "\n"
            });
            last = lines.collect();
            is_so(&last).then(|| last.clone())
        });
        found.unwrap_or_else(|error| panic!("{error:#}, on\n{last}"))
    }
}

impl Drop for Terminal<'_> {
    fn drop(&mut self) {
        if let Ok(mut tmux) = self.node.command("tmux") {
            let _ = tmux.arg("-S").arg(&self.socket).arg("kill-server").output();
        }
    }
}

#[test]
fn top_shows_pairs_live_and_takes_keys() {
    let test = "top_shows_pairs_live_and_takes_keys";
    let stage = Echoing::start();
    let (client, web, mesh) = (&stage.client, &stage.web, &stage.mesh);
    let node = mesh.node("b");
    echoes(client, SERVICES[0].parse().unwrap());
    let Some(terminal) = Terminal::start(node, "top") else {
        println!("SKIPPED {test}: tmux is not installed (Debian package tmux)");
        return;
    };
    // A connection that stays open appears, with how long it took; then one that is refused.
    let connect = format!(
        "connect --to {} --send {MARKER} --read --timeout 60000",
        web.at(8080)
    );
    let _open = client.app(&connect).unwrap();
    let screen = terminal.shows("the open connection", |screen| {
        screen.contains("default/client default/web 8080 TLS 1.3 1 ")
    });
    for part in [
        "1 node, 1 pair, 1 open,",
        "CLIENT SERVER PORT ENCRYPTED OPEN NEW/S▼ UP/S DOWN/S P50 P99 REFUSED",
        " ms ",
        "client default/client spiffe://cluster.local/ns/default/sa/client",
        "TLS 1.3, key exchange X25519MLKEM768;",
        "none was refused or reset",
    ] {
        assert!(screen.contains(part), "{part:?} is not in\n{screen}");
    }
    assert_eq!(call(mesh.outside(), web.at(8080))["event"], "failed");
    terminal.shows("the refused caller", |screen| {
        screen.contains("2 pairs") && screen.contains(" default/web 8080 plaintext 0 ")
    });

    terminal.press(&["/", "plain"]);
    terminal.shows("what the filter leaves", |screen| {
        screen.contains("1 pair, 0 open") && screen.contains("/plain_")
    });
    terminal.press(&["Enter"]);
    let refused = terminal.shows("the reason", |screen| {
        screen.contains("was refused or reset: denied: plaintext")
    });
    assert!(refused.contains("without an identity"), "{refused}");
    terminal.press(&["Escape"]);
    terminal.shows("both pairs again", |screen| screen.contains("2 pairs"));
    terminal.press(&["Right", "Right", "Right", "r"]);
    terminal.shows("another order", |screen| screen.contains("P50▲"));
    terminal.press(&["/", "tls", "Enter", "c"]);
    terminal.shows("one workload's pairs", |screen| {
        screen.contains("1 pair, 1 open") && screen.contains("of default/client /tls")
    });

    // Without the daemon, the table says so, and goes on with the next.
    stage.b.kill().unwrap();
    terminal.shows("that the daemon is gone", |screen| {
        screen.contains("cannot be asked: no daemon answers")
    });
    let _b = node.start_daemon().unwrap();
    terminal.shows("the next daemon", |screen| {
        !screen.contains("cannot be asked")
    });
    terminal.press(&["q"]);
    let screen = terminal.shows("the end", |screen| screen.contains("it ended with 0"));
    assert!(
        !screen.contains("CLIENT SERVER"),
        "the terminal is as before:\n{screen}"
    );
}

#[test]
fn top_without_a_terminal_says_what_to_use() {
    let mesh = mesh_tests::Mesh::builder().node("a").start().unwrap();
    let finished = mesh.node("a").auth(&["top"]).unwrap();
    assert_eq!(finished.code(), Some(1));
    assert!(
        finished.stderr.contains("top needs a terminal"),
        "{}",
        finished.stderr
    );
    assert!(
        finished.stderr.contains("`auth-daemon observe`"),
        "{}",
        finished.stderr
    );
}
