//! deploy/ as the API server sees it: nothing runs.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use mesh_tests::{AUTH_DAEMON_IMAGE, Context, Kubernetes, Process, Result, TIMEOUT};

fn repository() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

/// The objects of an overlay, as YAML.
fn built(overlay: &str) -> Result<String> {
    let mut command = Command::new("kubectl");
    command.arg("kustomize").arg(repository().join(overlay));
    Ok(Process::spawn(command)?.finish(TIMEOUT)?.ok()?.stdout)
}

fn without_surge(object: &str) -> String {
    if !object.contains("kind: DaemonSet\n") {
        return object.to_owned();
    }
    let lines = object
        .lines()
        .filter(|line| !line.trim().starts_with("maxSurge:"));
    let lines: Vec<&str> = lines.collect();
    lines
        .join("\n")
        .replace("maxUnavailable: 0", "maxUnavailable: 1")
        + "\n"
}

const OVERLAYS: [&str; 4] = [
    "deploy/base",
    "deploy/overlays/kind",
    "deploy/overlays/production",
    "tests/kustomize",
];

#[test]
fn an_api_server_takes_all_objects() -> Result<()> {
    let Some(cluster) = Kubernetes::shared("an_api_server_takes_all_objects") else {
        return Ok(());
    };
    // They are not made, so their namespace has to be there.
    cluster.apply(&repository().join("deploy/base/namespace.yaml"))?;
    let file = std::env::temp_dir().join(format!("deploy-{}.yaml", std::process::id()));
    for overlay in OVERLAYS {
        // Kubernetes 1.20 has no policy/v1; what it calls v1beta1 has the same fields. Its DaemonSets have no maxSurge.
        let objects =
            built(overlay)?.replace("apiVersion: policy/v1\n", "apiVersion: policy/v1beta1\n");
        let objects: Vec<String> = objects.split("---\n").map(without_surge).collect();
        let objects = objects.join("---\n");
        fs::write(&file, &objects)?;
        let said = cluster
            .kubectl([
                "apply",
                "--dry-run=server",
                "-f",
                &file.display().to_string(),
            ])
            .and_then(|finished| finished.ok())
            .with_context(|| overlay.to_owned())?
            .stdout;
        let taken = said.lines().count();
        let sent = objects
            .lines()
            .filter(|line| line.starts_with("kind: "))
            .count();
        assert_eq!(taken, sent, "{overlay}: {said}");
    }
    fs::remove_file(&file)?;
    Ok(())
}

#[test]
fn the_image_is_the_one_that_xtask_makes() -> Result<()> {
    if Kubernetes::missing().is_some() {
        println!("SKIPPED the_image_is_the_one_that_xtask_makes: there is no kubectl");
        return Ok(());
    }
    let name = AUTH_DAEMON_IMAGE.trim_start_matches("docker.io/library/");
    for overlay in OVERLAYS {
        let objects = built(overlay)?;
        let images: Vec<&str> = objects
            .lines()
            .filter_map(|line| line.trim().strip_prefix("image: "))
            .collect();
        assert_eq!(images.len(), 2, "{overlay}: {images:?}");
        for image in images {
            let own = image == name;
            let elsewhere = image == format!("registry.example.com/{name}");
            assert!(
                own || overlay.ends_with("production") && elsewhere,
                "{overlay}: {image}"
            );
        }
    }
    Ok(())
}
