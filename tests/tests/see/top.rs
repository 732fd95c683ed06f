//! `auth-daemon top` in a real terminal.

use crate::common::{
    lifecycle_pair::{Echoing, MARKER, SERVICES, call, echoes},
    terminal::Terminal,
};

#[test]
fn top_shows_pairs_live_and_takes_keys() {
    let test = "top_shows_pairs_live_and_takes_keys";
    let stage = Echoing::start();
    let (client, web, mesh) = (&stage.client, &stage.web, &stage.mesh);
    let node = mesh.node("b");
    echoes(client, SERVICES[0].parse().unwrap());
    let Some(terminal) = Terminal::start(node.place(), node.folder(), "top") else {
        println!("SKIPPED {test}: tmux is not installed (Debian package tmux)");
        return;
    };
    // A connection that stays open appears, with how long it took; then one that is refused.
    let connect = format!(
        "connect --to {} --send {MARKER} --read --timeout 60000",
        web.at(8080)
    );
    let _open = client.app(&connect).unwrap();
    // All in one read of the screen: the terminal may show a part of what is being drawn. On a busy machine, a
    // connection takes seconds.
    terminal.shows("the open connection", |screen| {
        let parts = [
            "1 node, 1 pair, 1 open,",
            "CLIENT SERVER PORT ENCRYPTED OPEN NEW/S▼ UP/S DOWN/S P50 P99 REFUSED",
            "default/client default/web 8080 TLS 1.3 1 ",
            "client default/client spiffe://cluster.local/ns/default/sa/client",
            "TLS 1.3, key exchange X25519MLKEM768;",
            "none was refused or reset",
        ];
        let has_times = [" ms ", " s "].iter().any(|unit| screen.contains(unit));
        has_times && parts.iter().all(|part| screen.contains(part))
    });
    assert_eq!(call(mesh.outside(), web.at(8080))["event"], "failed");
    terminal.shows("the refused caller", |screen| {
        screen.contains("2 pairs") && screen.contains(" default/web 8080 plaintext 0 ")
    });

    terminal.press(&["/", "plain"]);
    terminal.shows("what the filter leaves", |screen| {
        screen.contains("1 pair, 0 open") && screen.contains("/plain_")
    });
    terminal.press(&["Enter"]);
    terminal.shows("the reason", |screen| {
        screen.contains("was refused or reset: denied: plaintext")
            && screen.contains("without an identity")
    });
    terminal.press(&["Escape"]);
    terminal.shows("both pairs again", |screen| screen.contains("2 pairs"));
    terminal.press(&["Right", "Right", "Right", "r"]);
    terminal.shows("another order", |screen| screen.contains("P50▲"));
    terminal.press(&["/", "tls", "Enter", "c"]);
    terminal.shows("one workload's pairs", |screen| {
        screen.contains("1 pair, 1 open") && screen.contains("of default/client /tls")
    });

    // Without the daemon, the table says so, and continues with the next.
    stage.b.kill().unwrap();
    terminal.shows("that the daemon is gone", |screen| {
        screen.contains("cannot be reached: no daemon answers")
    });
    let _b = node.start_daemon().unwrap();
    terminal.shows("the next daemon", |screen| {
        !screen.contains("cannot be reached")
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
