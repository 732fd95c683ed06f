//! The daemon's memory for maps, and secrets that it must not write to disk.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::PermissionsExt;

use mesh_tests::{Daemon, DaemonOptions};

use crate::common::lifecycle_pair::{MARKER, daemons, daemons_with, echoes, pair, ways};
use crate::common::lifecycle_traces::{descriptors, files, pinned_map};

#[test]
fn maps_are_small_when_empty_and_hold_enough() {
    let mesh = pair();
    let (client, web) = (mesh.pod("client"), mesh.pod("web"));
    let _echo = web
        .app("echo-server --port 8080")
        .unwrap()
        .listening()
        .unwrap();
    let (a, _b) = daemons(&mesh);
    let locked = locked_by_maps(&a);
    println!(
        "{} bytes in {} maps: {locked:?}",
        locked.values().sum::<u64>(),
        locked.len()
    );
    assert!(locked.len() >= 8, "{locked:?}");
    // Of which 12 MiB are for the shares of 128 pods in the three maps of connections under way.
    assert!(locked.values().sum::<u64>() <= 24 << 20, "{locked:?}");

    let maps = mesh.node("a").pins().join("v2/maps");
    for (name, room) in [
        ("MESH", 1_000_000),
        ("PENDING", 100_000),
        ("DELIVERIES", 100_000),
        ("PODS", 1000),
    ] {
        let map = pinned_map(&maps.join(name));
        assert!(map["max_entries"] >= room, "{name}: {map:?}");
        assert!(
            locked.contains_key(&map["map_id"]),
            "{name} is one of the daemon's"
        );
    }
    // No entry of the connection remains.
    for to in ways(&web) {
        echoes(&client, to);
    }
    let after = locked_by_maps(&a);
    let (before, after): (u64, u64) = (locked.values().sum(), after.values().sum());
    assert!(after <= before + 4096, "{before}, then {after}");
}

/// Returns `memlock` of the daemon's maps, by map ID.
fn locked_by_maps(daemon: &Daemon) -> BTreeMap<u64, u64> {
    descriptors(daemon)
        .into_iter()
        .filter_map(|fields| Some((*fields.get("map_id")?, *fields.get("memlock")?)))
        .collect()
}

#[test]
fn only_the_root_private_key_is_written_to_disk() {
    let mesh = pair();
    let (client, web) = (mesh.pod("client"), mesh.pod("web"));
    let _echo = web
        .app("echo-server --port 8080")
        .unwrap()
        .listening()
        .unwrap();
    let options = DaemonOptions::default().log_level("trace");
    let (a, b) = daemons_with(&mesh, &options);
    for to in ways(&web) {
        echoes(&client, to);
    }
    let status = [&a, &b].map(|daemon| daemon.status_json().unwrap().to_string());
    a.kill().unwrap();
    b.kill().unwrap();

    let root = mesh.node("a").ca_folder().join("root.pem");
    let pem = fs::read_to_string(&root).unwrap();
    let key = pem
        .split("-----")
        .find(|part| part.lines().count() > 2)
        .unwrap();
    let secret = key.lines().find(|line| line.len() >= 40).unwrap();
    assert!(pem.contains("PRIVATE KEY"), "the root's key is there");
    let mode = |path: &std::path::Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
    assert_eq!((mode(&root), mode(root.parent().unwrap())), (0o600, 0o700));

    // All files of the mesh: configurations, logs, manifests, the CA's folder.
    let folder = mesh.node("a").folder().parent().unwrap().to_owned();
    let all = files(&folder);
    assert!(all.contains(&root) && all.contains(&mesh.node("a").folder().join("auth-daemon.log")));
    for file in all {
        let bytes = fs::read(&file).unwrap();
        let has = |what: &str| {
            bytes
                .windows(what.len())
                .any(|window| window == what.as_bytes())
        };
        if file != root {
            assert!(!has("PRIVATE KEY") && !has(secret), "{}", file.display());
        }
        // The apps' bytes do not get into a log either, not even at level `trace`.
        assert!(
            !has(MARKER) || !file.ends_with("auth-daemon.log"),
            "{}",
            file.display()
        );
    }
    for status in status {
        assert!(
            !status.contains("PRIVATE") && !status.contains(secret),
            "{status}"
        );
    }
}
