//! The page with ten and with 500 workloads.

use mesh_tests::Mesh;

use super::{
    chromium::Chromium,
    live::{ui, with_text},
    made_up::MadeUp,
};

const CHIPS: &str = "document.querySelectorAll('.chip').length";

#[test]
fn small_and_large_meshes_can_be_read() {
    let mesh = Mesh::builder().node("a").start().unwrap();
    let node = mesh.node("a");
    let started = Chromium::start("small_and_large_meshes_can_be_read", node.place()).unwrap();
    let Some(mut browser) = started else {
        return;
    };
    let _small = MadeUp::shop().serve(node.place(), 15000).unwrap();
    let (_ui, url) = ui(node, &["--address", "127.0.0.1"]);
    browser.open(&url).unwrap();
    // Ten, and an address outside the mesh.
    browser
        .wait("chip of each workload", &format!("{CHIPS} === 11"))
        .unwrap();
    browser.wait("a rate", &with_text(".rate", "/s")).unwrap();
    browser.keep("10-light").unwrap();
    browser.appear(1440, 900, true).unwrap();
    browser.click(&with_text(".chip", "checkout")).unwrap();
    browser
        .wait("the panel", &with_text("#details h2", "shop/checkout"))
        .unwrap();
    browser.keep("10-dark").unwrap();
    assert_eq!(browser.complaints().unwrap(), [""; 0]);

    let _large = MadeUp::large().serve(node.place(), 15001).unwrap();
    let (_ui, url) = ui(node, &["--address", "127.0.0.1:15001"]);
    browser.open(&url).unwrap();
    let boxes = "document.querySelectorAll('.title[aria-expanded=false]').length";
    browser
        .wait(
            "a closed box for each namespace",
            &format!("{boxes} === 25"),
        )
        .unwrap();
    assert_eq!(browser.value(CHIPS).unwrap(), 0);
    browser
        .wait("a line", "document.querySelector('.edge')")
        .unwrap();
    browser.keep("500-dark").unwrap();
    browser.appear(1440, 900, false).unwrap();
    browser.click(&with_text(".title", "team-03")).unwrap();
    browser
        .wait("the open namespace", &format!("{CHIPS} === 17"))
        .unwrap();
    // Those without connections are counted, so that they do not hide the others.
    browser
        .wait(
            "the others",
            &with_text(".box text", "3 without connections"),
        )
        .unwrap();
    browser.keep("500-open").unwrap();

    // A search shows what it finds and what that has to do with.
    browser
        .value("document.getElementById('search').focus()")
        .unwrap();
    browser.write("service-123").unwrap();
    browser
        .wait(
            "the found workload",
            &with_text(".chip:not(.beside)", "service-123"),
        )
        .unwrap();
    let beside = browser
        .value("document.querySelectorAll('.chip.beside').length")
        .unwrap();
    assert!((1..20).contains(&beside.as_u64().unwrap()), "{beside}");
    browser.keep("500-found").unwrap();
    browser
        .click("document.getElementById('show-table')")
        .unwrap();
    browser
        .wait("its rows", &with_text("tbody tr", "team-06/service-123"))
        .unwrap();
    browser.write("none").unwrap();
    browser
        .wait("advice", &with_text("#empty h2", "Nothing matches"))
        .unwrap();
    assert_eq!(browser.complaints().unwrap(), [""; 0]);
}
