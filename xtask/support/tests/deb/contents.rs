//! What is in the package.

use std::process::Command;

use mesh_tests::Architecture;
use xtask_support::step::which;

use crate::{Package, source};

#[test]
fn package_has_what_debian_expects() {
    let Some(package) = Package::pack("package_has_what_debian_expects") else {
        return;
    };
    let version = format!("{}-1", env!("CARGO_PKG_VERSION"));
    let architecture = Architecture::native().unwrap().name();
    let name = package.path.file_name().unwrap().to_str().unwrap();
    assert_eq!(name, format!("auth-daemon_{version}_{architecture}.deb"));

    let fields = package.ask("--field");
    for field in [
        "Package: auth-daemon\n",
        &format!("Version: {version}\n"),
        &format!("Architecture: {architecture}\n"),
        "Section: net\n",
        "Depends: libc6 (>= ",
        "Maintainer: ",
        "Description: Mutual TLS for ",
    ] {
        assert!(fields.contains(field), "{field:?} is not in:\n{fields}");
    }
    // What the package's changelog is about.
    let changelog = source("deploy/debian/changelog");
    let newest = format!("auth-daemon ({version}) ");
    assert!(changelog.starts_with(&newest), "{changelog}");

    let contents = package.ask("--contents");
    for (mode, path) in [
        ("-rwxr-xr-x", "/usr/bin/auth-daemon"),
        ("-rw-r--r--", "/usr/lib/systemd/system/auth-daemon.service"),
        ("-rw-r--r--", "/etc/auth-daemon/config.yaml"),
        ("-rw-r--r--", "/etc/auth-daemon/manifests/README"),
        ("-rw-r--r--", "/usr/share/doc/auth-daemon/copyright"),
        ("-rw-r--r--", "/usr/share/doc/auth-daemon/changelog.gz"),
        (
            "-rw-r--r--",
            "/usr/share/doc/auth-daemon/changelog.Debian.gz",
        ),
        ("-rw-r--r--", "/usr/share/doc/auth-daemon/DEBIAN.md"),
    ] {
        let has = contents.lines().any(|line| {
            line.starts_with(&format!("{mode} 0/0 ")) && line.ends_with(&format!(" .{path}"))
        });
        assert!(has, "{mode} {path} is not in:\n{contents}");
    }
    // Nothing outside of these, such as a path of the machine that has built it.
    for line in contents.lines() {
        let path = line.split_whitespace().last().unwrap();
        let is_expected = ["./etc/", "./usr/"]
            .iter()
            .any(|folder| path.starts_with(folder));
        assert!(is_expected, "{line}");
    }

    // A user's changes of these stay when the package is upgraded.
    assert_eq!(
        package.read("/DEBIAN/conffiles").trim(),
        "/etc/auth-daemon/config.yaml\n/etc/auth-daemon/manifests/README"
    );
    assert_eq!(
        package.read("/usr/lib/systemd/system/auth-daemon.service"),
        source("deploy/debian/auth-daemon.service")
    );
    for script in ["postinst", "prerm", "postrm"] {
        let text = package.read(&format!("/DEBIAN/{script}"));
        assert!(
            text.starts_with("#!/bin/sh\nset -e\n") && !text.contains("#DEBHELPER#"),
            "{script}: {text}"
        );
        // Nobody has configured it yet.
        assert!(!text.contains("_dh_action=start"), "{script}: {text}");
    }
}

#[test]
fn lintian_finds_nothing_unexplained() {
    let name = "lintian_finds_nothing_unexplained";
    let Some(lintian) = which("lintian") else {
        // It consists of more than a hundred packages, so the tests do not install it.
        println!("SKIPPED {name}: no lintian (Debian's lintian)");
        return;
    };
    let Some(package) = Package::pack(name) else {
        return;
    };
    let mut lintian = Command::new(lintian);
    lintian.args(["--allow-root", "--fail-on", "error,warning"]);
    let said = lintian.arg(&package.path).output().unwrap();
    let text = String::from_utf8_lossy(&said.stdout);
    assert!(said.status.success(), "{text}");
}
