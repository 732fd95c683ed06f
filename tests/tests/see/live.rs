//! A mesh of two nodes in a browser, while connections come and go.

use std::time::Duration;

use mesh_tests::{Node, Process, TIMEOUT, eventually, slowdown};
use serde_json::{Value, json};

use super::chromium::Chromium;
use crate::common::{
    admin_port::forward_admin_port,
    lifecycle_pair::{Echoing, SERVICES, call, echoes},
};

/// A pod's name that would run, if it became markup.
const HOSTILE: &str = "<script>window.pwned=1<!--\u{202e}";

/// A policy that denies what `client` asks of `web`.
fn policy(name: &str) -> Value {
    json!({
        "apiVersion": "security.istio.io/v1", "kind": "AuthorizationPolicy",
        "metadata": {"name": name, "namespace": "default"},
        "spec": {
            "action": "DENY", "selector": {"matchLabels": {"app": "web"}},
            "rules": [{"from": [{"source": {"serviceAccounts": ["client"]}}]}],
        },
    })
}

/// Starts `auth-daemon ui`, and returns the address that it prints.
pub(crate) fn ui(node: &Node, options: &[&str]) -> (Process, String) {
    let arguments = [&["ui"], options].concat();
    let mut process = node.spawn_auth(&arguments).unwrap();
    let url = process
        .wait_for_line("the page's address", TIMEOUT, |line| {
            line.starts_with("http://127.0.0.1:")
                .then(|| line.to_owned())
        })
        .unwrap();
    (process, url)
}

/// An expression for the first element that contains a text.
pub(crate) fn with_text(selector: &str, text: &str) -> String {
    format!(
        "[...document.querySelectorAll({})].find((one) => one.textContent.includes({}))",
        json!(selector),
        json!(text)
    )
}

#[test]
fn the_mesh_is_seen_in_a_browser() {
    let stage = Echoing::start();
    let (client, web, mesh) = (&stage.client, &stage.web, &stage.mesh);
    let (here, there) = (mesh.node("a"), mesh.node("b"));
    let started = Chromium::start("the_mesh_is_seen_in_a_browser", here.place()).unwrap();
    let Some(mut browser) = started else {
        return;
    };
    let hostile = json!({
        "apiVersion": "v1", "kind": "Pod",
        "metadata": {"name": HOSTILE, "namespace": "default", "uid": "hostile"},
        "spec": {"nodeName": "c", "serviceAccountName": "hostile", "containers": []},
        "status": {"phase": "Running", "podIP": "10.77.9.9"},
    });
    mesh.manifests()
        .write("hostile.json", &hostile.to_string())
        .unwrap();
    let of_b = forward_admin_port(here.netns(), there.netns()).to_string();
    let (_ui, url) = ui(here, &["--address", "127.0.0.1", "--address", &of_b]);

    browser.open(&url).unwrap();
    let chips = "[...document.querySelectorAll('.chip')].length";
    browser
        .wait("chip of each workload", &format!("{chips} === 3"))
        .unwrap();
    // What is not there cannot have appeared already.
    assert_eq!(
        browser
            .value("document.querySelectorAll('.edge').length")
            .unwrap(),
        0
    );

    assert_eq!(browser.complaints().unwrap(), [""; 0]);

    // The table counts what the map shows.
    browser
        .click("document.getElementById('show-table')")
        .unwrap();
    appears(&mut browser, "mtls", || {
        echoes(client, SERVICES[0].parse().unwrap())
    });
    appears(&mut browser, "refused", || {
        assert_eq!(call(mesh.outside(), web.at(8080))["event"], "failed");
    });

    // Both nodes count a connection between them; the page counts it once.
    let ended = "document.querySelector('tr.mtls').children[6].textContent";
    assert_eq!(browser.value(ended).unwrap(), "3");
    browser
        .click("document.getElementById('show-map')")
        .unwrap();
    browser
        .wait(
            "line of each kind",
            "document.querySelectorAll('.edge').length === 2",
        )
        .unwrap();
    browser.keep("map").unwrap();

    // A line shows who called whom, with their certificates, and what the policies say.
    browser
        .click("document.querySelector('.sign.mtls circle')")
        .unwrap();
    for part in [
        "default/client → default/web:8080",
        "spiffe://cluster.local/ns/default/sa/client",
        "spiffe://cluster.local/ns/default/sa/web",
        "on a: valid until",
        "b (server)",
        "allowed: no policy restricts it",
        "mutual TLS: STRICT by the mesh's default",
    ] {
        shows(&mut browser, part);
    }
    browser.keep("connections").unwrap();
    browser
        .click("document.querySelector('.sign.refused circle')")
        .unwrap();
    shows(&mut browser, "no identity was proven");
    shows(&mut browser, "refused");

    // What a policy would refuse, if it were not a dry run.
    let mut trial = policy("trial");
    trial["metadata"]["annotations"] = json!({"istio.io/dry-run": "true"});
    mesh.manifests().apply(&trial).unwrap();
    browser
        .click("document.querySelector('.sign.mtls circle')")
        .unwrap();
    let notice = with_text("#details", "A dry-run policy would refuse");
    shows_while(&mut browser, &notice, || echoes(client, web.at(8080)));
    shows(
        &mut browser,
        "dry run: denied by AuthorizationPolicy default/trial rules[0]",
    );

    // A policy that selects the workload, and what it decides.
    mesh.manifests().apply(&policy("nobody")).unwrap();
    browser
        .click("document.getElementById('show-table')")
        .unwrap();
    // A connection that is open when the policy comes into force is ended, not denied: try until one is denied.
    let row = with_text("tr.refused", "AuthorizationPolicy default/nobody rules[0]");
    shows_while(&mut browser, &row, || {
        call(client, web.at(8080));
    });
    browser
        .click("document.getElementById('show-map')")
        .unwrap();

    // With the keyboard only: to a workload of the map, and back.
    browser.press("Escape").unwrap();
    browser
        .wait("closed panel", "document.getElementById('details').hidden")
        .unwrap();
    let client_chip = with_text(".chip", "client");
    browser.value(&format!("{client_chip}.focus()")).unwrap();
    browser.press("ArrowRight").unwrap();
    browser.press("Enter").unwrap();
    for part in [
        "default/web",
        "AuthorizationPolicy default/nobody (DENY): selects app=web",
        "Services that it may reach: 1 of 1",
        "protected",
    ] {
        shows(&mut browser, part);
    }
    browser.press("Escape").unwrap();
    let focused = "document.activeElement.getAttribute('aria-label')";
    assert_eq!(browser.value(focused).unwrap(), "default web, Service web");

    // A name stays text, and a character that turns text around is visible.
    browser
        .value(&format!("{}.focus()", with_text(".chip", "<script>")))
        .unwrap();
    browser.press("Enter").unwrap();
    shows(&mut browser, "default/<script>window.pwned=1<!--\u{fffd}");
    assert_eq!(browser.value("window.pwned === undefined").unwrap(), true);
    assert_eq!(browser.value("document.scripts.length").unwrap(), 1);

    // The page of one daemon, dark.
    browser.appear(1440, 900, true).unwrap();
    browser.open("http://localhost:15000/").unwrap();
    browser
        .wait("chips of the daemon's own page", &format!("{chips} >= 3"))
        .unwrap();
    browser.keep("daemon").unwrap();
    assert_eq!(browser.complaints().unwrap(), [""; 0]);

    // A daemon that stops is named, and what was seen stays.
    stage.a.kill().unwrap();
    let notice = with_text("#notices p", "Node a cannot be reached");
    browser.wait("notice", &notice).unwrap();
    browser.open(&url).unwrap();
    let notice = with_text(
        "#notices p",
        "Node 127.0.0.1:15000 cannot be reached: no daemon answers",
    );
    browser.wait("notice of one of two", &notice).unwrap();
    browser
        .wait(
            "the other node's connections",
            "document.querySelector('.edge')",
        )
        .unwrap();
    stage.b.kill().unwrap();
    browser.open(&url).unwrap();
    let advice = with_text("#empty h2", "No daemon can be reached");
    browser.wait("advice", &advice).unwrap();
    browser.keep("no-daemon").unwrap();

    // What the tests above rely on: inline code does not run, and the browser complains.
    browser.complaints().unwrap();
    browser
        .value("document.head.append(Object.assign(document.createElement('style'), {textContent: 'p {}'}))")
        .unwrap();
    let found = browser.complaints().unwrap();
    assert!(
        found
            .iter()
            .any(|one| one.contains("Content Security Policy")),
        "{found:?}"
    );
}

/// Asserts that of three connections, one is shown within two seconds: the others may meet a busy moment of the machine.
fn appears(browser: &mut Chromium, kind: &str, connect: impl Fn()) {
    let mut times = Vec::new();
    for ended in 1..=3 {
        connect();
        let counted = format!(
            "[...document.querySelectorAll('tr.{kind}')].some((row) => Number(row.children[6].textContent) >= {ended})"
        );
        times.push(browser.wait(kind, &counted).unwrap().1);
    }
    println!("{kind}: shown after {times:?}");
    assert!(
        *times.iter().min().unwrap() < Duration::from_secs(2) * slowdown(),
        "{kind}: {times:?}"
    );
}

/// Waits until the panel shows a text.
fn shows(browser: &mut Chromium, text: &str) {
    let panel = with_text("#details:not([hidden])", text);
    browser.wait(text, &panel).unwrap();
}

/// Connects until the page has an element.
fn shows_while(browser: &mut Chromium, element: &str, connect: impl Fn()) {
    eventually(TIMEOUT, element, || {
        connect();
        let is_there = browser.value(&format!("Boolean({element})")).unwrap();
        (is_there == true).then_some(())
    })
    .unwrap();
}
