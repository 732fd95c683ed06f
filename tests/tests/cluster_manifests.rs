//! Dry runs of deploy/ against the API server. Nothing is created.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use mesh_tests::{
    AUTH_DAEMON_IMAGE, Context, Kubernetes, Process, Result, TIMEOUT, programs_folder,
};

fn repository() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

/// The objects of an overlay, as YAML. Fails on any warning, such as of a deprecated field.
fn built(overlay: &str) -> Result<String> {
    let mut command = Command::new(programs_folder().join("kubectl"));
    command.arg("kustomize").arg(repository().join(overlay));
    let built = Process::spawn(command)?.finish(TIMEOUT)?.ok()?;
    assert_eq!(built.stderr, "", "{overlay}");
    Ok(built.stdout)
}

const OVERLAYS: [&str; 4] = [
    "deploy/base",
    "deploy/overlays/kind",
    "deploy/overlays/production",
    "tests/kustomize",
];

#[test]
fn api_server_accepts_every_object_without_warning() -> Result<()> {
    let test = "api_server_accepts_every_object_without_warning";
    let Some(cluster) = Kubernetes::shared(test) else {
        return Ok(());
    };
    // A dry run creates nothing, so the objects' namespace must exist.
    cluster.apply(&repository().join("deploy/base/namespace.yaml"))?;
    let file = std::env::temp_dir().join(format!("deploy-{}.yaml", std::process::id()));
    for overlay in OVERLAYS {
        let objects = built(overlay)?;
        fs::write(&file, &objects)?;
        let answer = cluster
            .kubectl([
                "apply",
                "--dry-run=server",
                "-f",
                &file.display().to_string(),
            ])
            .and_then(|finished| finished.ok())
            .with_context(|| overlay.to_owned())?;
        let accepted = answer.stdout.lines().count();
        let sent = objects
            .lines()
            .filter(|line| line.starts_with("kind: "))
            .count();
        assert_eq!(accepted, sent, "{overlay}: {}", answer.stdout);
        assert_eq!(answer.stderr, "", "{overlay}");
    }
    fs::remove_file(&file)?;
    Ok(())
}

#[test]
fn manifests_use_the_image_that_xtask_builds() -> Result<()> {
    if let Some(why) = Kubernetes::missing() {
        println!("SKIPPED manifests_use_the_image_that_xtask_builds: {why}");
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
