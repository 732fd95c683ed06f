//! Invalid configurations: all errors are reported at once, with file and field, and nothing is changed.

use std::collections::BTreeSet;

use mesh_tests::{Mesh, Node, PodSpec};

use crate::common::lifecycle_traces::{Routing, attached_to_node, files};

#[test]
fn every_command_reports_all_config_errors_at_once() {
    let mesh = one_node();
    let node = mesh.node("a");
    let config = "nodeName: 'a b'\ntrustDomain: Not/One\nmode: strict\nmood: good\n\
                  podNetworks: [10.0.0.0/33, 7]\ndrain: 5\ndiscovery: {files: relative/path}\n\
                  ca: {certificateLifetime: 1s}\nlog: {format: xml, level: 'a=b=c'}\n\
                  kernel: {pins: pins, cgroups: /x}\n";
    for command in COMMANDS {
        let errors = refused(node, command, config);
        for fault in [
            "nodeName: \"a b\"",
            "trustDomain: \"Not/One\"",
            "mode: \"strict\": is neither STRICT nor PERMISSIVE",
            "mood: there is no such field",
            "podNetworks[0]: \"10.0.0.0/33\"",
            "podNetworks[1]: 7 is not a string",
            "drain: 5 is not a string",
            "discovery.files: \"relative/path\": is not an absolute path",
            "ca: has neither directory",
            "ca.certificateLifetime: \"1s\": is not between",
            "log.format: \"xml\": is neither text nor json",
            "log.level: \"a=b=c\"",
            "kernel.pins: \"pins\": is not an absolute path",
            "kernel.cgroups: there is no such field",
        ] {
            assert!(
                errors.contains(fault),
                "{command} does not say {fault:?}:\n{errors}"
            );
        }
        assert_eq!(
            errors.lines().count(),
            15,
            "one line for each error, one for the file:\n{errors}"
        );
    }
}

#[test]
fn invalid_yaml_is_reported_with_its_position() {
    let mesh = one_node();
    let node = mesh.node("a");
    for command in COMMANDS {
        let errors = refused(node, command, "nodeName: a\nca: {directory: [\n");
        assert!(
            errors.contains("is not YAML") && errors.contains("line"),
            "{errors}"
        );
        assert!(refused(node, command, "- a\n- b\n").contains("is not a mapping"));
        let none = node
            .folder()
            .join("no-such-file.yaml")
            .display()
            .to_string();
        let finished = node.auth(&[command, "--config", &none]).unwrap();
        assert_eq!(finished.code(), Some(1));
        assert!(finished.stderr.contains(&none), "{}", finished.stderr);
        assert!(
            finished.stderr.contains("No such file"),
            "{}",
            finished.stderr
        );
    }
}

#[test]
fn missing_resources_are_reported_with_their_field() {
    let mesh = one_node();
    let node = mesh.node("a");
    let folder = node.folder().display().to_string();
    let ca = format!("{folder}/ca");
    let manifests = node.manifests().folder().display().to_string();
    let (cgroup, pins) = (node.cgroup().display(), node.pins().display());
    for (manifests, cgroup, pins, complaint) in [
        (
            manifests.as_str(),
            cgroup.to_string(),
            "/tmp/none".to_owned(),
            "kernel.pins",
        ),
        (
            &manifests,
            "/tmp".to_owned(),
            pins.to_string(),
            "kernel.cgroup",
        ),
        (
            &manifests,
            "/sys/fs/none".to_owned(),
            pins.to_string(),
            "kernel.cgroup",
        ),
        (
            "/no/such/folder",
            cgroup.to_string(),
            pins.to_string(),
            "discovery.files",
        ),
    ] {
        let config = format!(
            "nodeName: a\ndiscovery: {{files: {manifests}}}\nca: {{directory: {ca}}}\n\
             kernel: {{cgroup: {cgroup}, pins: {pins}}}\n"
        );
        let path = node.folder().join("config.yaml");
        std::fs::write(&path, config).unwrap();
        let finished = node
            .auth(&["run", "--config", &path.display().to_string()])
            .unwrap();
        assert_eq!(finished.code(), Some(1), "{}", finished.stderr);
        let last = finished.stderr.lines().last().unwrap();
        assert!(
            last.starts_with("auth-daemon: ") && last.contains(complaint),
            "{last}"
        );
    }
    untouched(&mesh);
}

#[test]
fn refuses_ca_directory_that_others_can_read() {
    use std::os::unix::fs::PermissionsExt;
    let mesh = one_node();
    let node = mesh.node("a");
    node.start_daemon().unwrap().kill().unwrap();
    node.unload().unwrap().ok().unwrap();
    let root = node.ca_folder().join("root.pem");
    let config = node.folder().join("auth-daemon.yaml").display().to_string();
    let refused = |complaints: &[&str]| {
        let finished = node.auth(&["run", "--config", &config]).unwrap();
        assert_eq!(finished.code(), Some(1), "{}", finished.stderr);
        for complaint in complaints {
            assert!(finished.stderr.contains(complaint), "{}", finished.stderr);
        }
    };
    let good = std::fs::read_to_string(&root).unwrap();
    for mode in [0o640, 0o604, 0o660] {
        std::fs::set_permissions(&root, PermissionsExt::from_mode(mode)).unwrap();
        refused(&["ca.directory", "root.pem", "chmod 600"]);
    }
    std::fs::set_permissions(&root, PermissionsExt::from_mode(0o600)).unwrap();
    std::fs::write(&root, &good[..good.len() / 2]).unwrap();
    refused(&["ca.directory", "root.pem"]);
    std::fs::write(&root, &good).unwrap();
    let a = node.start_daemon().unwrap();
    assert!(a.is_ready());
}

fn one_node() -> Mesh {
    Mesh::builder()
        .node("a")
        .pod(PodSpec::new("pod").on("a"))
        .start()
        .unwrap()
}

/// Returns the errors of a command that must reject this configuration with exit code 1.
fn refused(node: &Node, command: &str, config: &str) -> String {
    let path = node.folder().join("faulty.yaml");
    std::fs::write(&path, config).unwrap();
    let path = path.display().to_string();
    let finished = node.auth(&[command, "--config", &path]).unwrap();
    assert_eq!(finished.code(), Some(1), "{command}: {}", finished.stderr);
    assert!(
        finished.stderr.starts_with("auth-daemon: "),
        "{}",
        finished.stderr
    );
    assert!(finished.stderr.contains(&path), "{}", finished.stderr);
    assert_eq!(finished.stdout, "");
    finished.stderr
}

fn untouched(mesh: &Mesh) {
    let node = mesh.node("a");
    assert_eq!(files(node.pins()), BTreeSet::new());
    assert!(attached_to_node(node).values().all(|count| *count == 0));
    assert!(!Routing::of(&mesh.pod("pod")).is_prepared());
}

const COMMANDS: [&str; 3] = ["run", "check", "unload"];
