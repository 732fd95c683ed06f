//! `cargo xtask kubernetes`: the programs of a real Kubernetes, for the tests that need an API server or a whole cluster.
//!
//! Debian has no package of them, but the source: what is built is that, with Debian's Go. The result stays in a folder,
//! so that it is there at once the next time.

use std::env;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::apt;
use crate::step::{self, executable, run, step, which};

/// Where the programs go, unless `$KUBE` says otherwise. The tests look in the same place.
const DEFAULT_FOLDER: &str = "/opt/kube";
/// What is built: the names of folders below `cmd/`.
const PROGRAMS: [&str; 5] = [
    "kube-apiserver",
    "kube-controller-manager",
    "kube-scheduler",
    "kubelet",
    "kube-proxy",
];
/// What else the tests run, and Debian's packages of it.
const INSTALLED: [(&str, &str); 9] = [
    ("etcd", "etcd-server"),
    ("kubectl", "kubernetes-client"),
    ("curl", "curl"),
    ("containerd", "containerd"),
    ("runc", "runc"),
    ("/usr/lib/cni/bridge", "containernetworking-plugins"),
    ("iptables", "iptables"),
    ("conntrack", "conntrack"),
    ("busybox", "busybox-static"),
];
/// What the build needs.
const TOOLS: [&str; 6] = [
    "golang-go",
    "make",
    "rsync",
    "git",
    "binutils",
    "golang-github-modern-go-reflect2-dev",
];

/// Makes sure that all of it is there.
///
/// # Errors
/// When it is not and cannot be made here: with the reason.
pub(crate) fn ensure() -> Result<()> {
    let folder = folder();
    let unbuilt = PROGRAMS.iter().any(|name| !executable(&folder.join(name)));
    let mut packages: Vec<String> = INSTALLED
        .iter()
        .filter(|(program, _)| which(program).is_none())
        .map(|(_, package)| (*package).to_owned())
        .collect();
    if !unbuilt && packages.is_empty() {
        return Ok(());
    }
    if !apt::usable() {
        let what = if unbuilt {
            "is built from Debian's source".to_owned()
        } else {
            format!("needs {}, which apt installs", packages.join(", "))
        };
        bail!("Kubernetes {what}, as root: this is no such machine");
    }
    if unbuilt {
        packages.extend(TOOLS.map(str::to_owned));
    }
    step("install what a Kubernetes cluster needs", || {
        apt::update()?;
        apt::install(&packages)
    })?;
    if unbuilt {
        let what = format!(
            "build {} into {} (once; some minutes)",
            PROGRAMS.join(", "),
            folder.display()
        );
        step(&what, || build(&folder))?;
    }
    Ok(())
}

/// For the commands that can do without: the tests that need it say that they are skipped.
pub(crate) fn ensure_or_say() {
    if let Err(error) = ensure() {
        eprintln!(
            "    no Kubernetes: {error:#}\n    tests that need its API server or its nodes are skipped; `cargo xtask \
             kubernetes` tries again"
        );
    }
}

fn folder() -> PathBuf {
    env::var_os("KUBE").map_or_else(|| DEFAULT_FOLDER.into(), PathBuf::from)
}

fn build(folder: &Path) -> Result<()> {
    let work = Work::new()?;
    let tarball = download(&work.0)?;
    let source = work.0.join("go/src/k8s.io/kubernetes");
    fs::create_dir_all(&source).with_context(|| format!("making {}", source.display()))?;
    run(Command::new("tar")
        .arg("--directory")
        .arg(&source)
        .args(["--strip-components=1", "--extract", "--file"])
        .arg(&tarball))?;
    newer_reflect2(&source)?;
    let version = write_version(&work.0, &tarball)?;
    // Its makefiles ask git where the top is.
    run(Command::new("git")
        .current_dir(&source)
        .args(["init", "--quiet"]))?;
    let targets: Vec<_> = PROGRAMS.iter().map(|name| format!("cmd/{name}")).collect();
    run(Command::new("make")
        .current_dir(&source)
        .arg(format!("WHAT={}", targets.join(" ")))
        .env("GOPATH", work.0.join("go"))
        .env("GOCACHE", work.0.join("cache"))
        .env("GO111MODULE", "off")
        .env("CGO_ENABLED", "0")
        .env("KUBE_GIT_VERSION_FILE", version))?;
    fs::create_dir_all(folder).with_context(|| format!("making {}", folder.display()))?;
    // One folder, with the name of this machine's architecture.
    let built = fs::read_dir(source.join("_output/local/bin/linux"))
        .context("looking for what was built")?
        .flatten()
        .map(|entry| entry.path())
        .next()
        .context("nothing was built")?;
    for name in PROGRAMS {
        // By another name first: what lies under its own is whole.
        let draft = folder.join(format!(".{name}"));
        run(Command::new("install")
            .args(["--strip", "--mode=755"])
            .arg(built.join(name))
            .arg(&draft))?;
        fs::rename(&draft, folder.join(name))
            .with_context(|| format!("moving {name} into {}", folder.display()))?;
    }
    Ok(())
}

/// The upstream source, checked by apt as all that it downloads. The machine's own list of sources stays as it is.
fn download(work: &Path) -> Result<PathBuf> {
    let sources = work.join("sources.list.d");
    fs::create_dir_all(&sources).with_context(|| format!("making {}", sources.display()))?;
    let mut count = 0;
    for path in source_lists()? {
        let text =
            fs::read_to_string(&path).with_context(|| format!("reading {}", path.display()))?;
        let name = path.file_name().unwrap_or_default();
        if let Some(text) = as_source(&text, path.extension().is_some_and(|e| e == "sources")) {
            fs::write(sources.join(name), text).context("writing a list of sources")?;
            count += 1;
        }
    }
    if count == 0 {
        bail!("no Debian archive is configured in /etc/apt");
    }
    for folder in ["lists/partial", "source"] {
        fs::create_dir_all(work.join(folder)).context("making a folder")?;
    }
    let apt = |arguments: &[&str]| {
        let mut command = Command::new("apt-get");
        for (option, path) in [
            ("Dir::Etc::sourcelist=", Path::new("/dev/null")),
            ("Dir::Etc::sourceparts=", &sources),
            ("Dir::State::lists=", &work.join("lists")),
        ] {
            command.arg("-o").arg(format!("{option}{}", path.display()));
        }
        // It would run as another user, who cannot write here.
        command
            .args(["-o", "APT::Sandbox::User=root", "--quiet"])
            .args(arguments)
            .current_dir(work.join("source"));
        run(&mut command)
    };
    apt(&["update"])?;
    apt(&["source", "--download-only", "kubernetes"])?;
    let found = fs::read_dir(work.join("source")).context("reading what was downloaded")?;
    found
        .flatten()
        .map(|entry| entry.path())
        .find(|path| path.to_string_lossy().contains(".orig.tar."))
        .context("Debian's source package of Kubernetes has no upstream source in it")
}

fn source_lists() -> Result<Vec<PathBuf>> {
    let mut lists = vec![PathBuf::from("/etc/apt/sources.list")];
    let parts = fs::read_dir("/etc/apt/sources.list.d").context("/etc/apt/sources.list.d")?;
    lists.extend(parts.flatten().map(|entry| entry.path()));
    lists.retain(|path| path.is_file());
    Ok(lists)
}

/// A list of Debian's archives with their sources instead of their packages; nothing where it names no such archive.
fn as_source(text: &str, deb822: bool) -> Option<String> {
    let debian = |text: &str| text.contains("debian.org/");
    let text = if deb822 {
        let paragraphs = text.split("\n\n").filter(|paragraph| debian(paragraph));
        let sources = paragraphs.map(|paragraph| {
            let lines = paragraph.lines().map(|line| match line.split_once(':') {
                Some(("Types", _)) => "Types: deb-src",
                _ => line,
            });
            lines.collect::<Vec<_>>().join("\n")
        });
        sources.collect::<Vec<_>>().join("\n\n")
    } else {
        let lines = text.lines().filter(|line| debian(line));
        let sources =
            lines.filter_map(|line| Some(format!("deb-src {}", line.trim().strip_prefix("deb ")?)));
        sources.collect::<Vec<_>>().join("\n")
    };
    (!text.is_empty()).then(|| text + "\n")
}

/// The reflect2 in an old Kubernetes crashes with Go 1.18 and later: Debian's own takes its place.
fn newer_reflect2(source: &Path) -> Result<()> {
    let bundled = source.join("vendor/github.com/modern-go/reflect2");
    let debian = Path::new("/usr/share/gocode/src/github.com/modern-go/reflect2");
    if !bundled.is_dir() {
        bail!("this Kubernetes source comes without the libraries that it needs");
    }
    let is_code = |path: &Path| path.extension().is_some_and(|e| e == "go" || e == "s");
    let files = |folder: &Path| -> Result<Vec<PathBuf>> {
        let entries =
            fs::read_dir(folder).with_context(|| format!("reading {}", folder.display()))?;
        let paths = entries.flatten().map(|entry| entry.path());
        Ok(paths.filter(|path| is_code(path)).collect())
    };
    for file in files(&bundled)? {
        fs::remove_file(&file).with_context(|| format!("removing {}", file.display()))?;
    }
    for file in files(debian)? {
        let name = file.file_name().unwrap_or_default();
        fs::copy(&file, bundled.join(name))
            .with_context(|| format!("copying {}", file.display()))?;
    }
    Ok(())
}

/// What `--version` is to say: the archive has no git to ask.
fn write_version(work: &Path, tarball: &Path) -> Result<PathBuf> {
    let name = tarball.file_name().unwrap_or_default().to_string_lossy();
    let version = upstream_version(&name).with_context(|| format!("{name}: has no version"))?;
    let mut parts = version.split('.');
    let (major, minor) = (parts.next().unwrap_or("1"), parts.next().unwrap_or("0"));
    let path = work.join("version");
    let text = format!(
        "KUBE_GIT_COMMIT=debian\nKUBE_GIT_TREE_STATE=archive\nKUBE_GIT_VERSION=v{version}\n\
         KUBE_GIT_MAJOR={major}\nKUBE_GIT_MINOR={minor}\n"
    );
    fs::write(&path, text).with_context(|| format!("writing {}", path.display()))?;
    Ok(path)
}

/// `1.20.2` of `kubernetes_1.20.5+really1.20.2.orig.tar.gz`, as Debian calls one that came after a newer one; what else
/// Debian adds to it is left out.
fn upstream_version(name: &str) -> Option<&str> {
    let version = name.strip_prefix("kubernetes_")?.split(".orig.").next()?;
    let version = version.rsplit("+really").next()?;
    version
        .split(['+', '~'])
        .next()
        .filter(|version| !version.is_empty())
}

/// A temporary folder, removed at the end.
struct Work(PathBuf);

impl Work {
    fn new() -> Result<Self> {
        let folder = step::workspace()
            .join("target/tmp")
            .join(format!("kubernetes-{}", std::process::id()));
        fs::create_dir_all(&folder).with_context(|| format!("making {}", folder.display()))?;
        Ok(Self(folder))
    }
}

impl Drop for Work {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_of_packages_become_lists_of_sources() {
        let deb822 = "Types: deb\nURIs: http://deb.debian.org/debian\nSuites: bookworm\n\n\
                      Types: deb\nURIs: https://deb.example.com/x\n";
        assert_eq!(
            as_source(deb822, true).as_deref(),
            Some("Types: deb-src\nURIs: http://deb.debian.org/debian\nSuites: bookworm\n")
        );
        let lines = "# comment\ndeb http://deb.debian.org/debian bookworm main\ndeb https://example.com x\n";
        assert_eq!(
            as_source(lines, false).as_deref(),
            Some("deb-src http://deb.debian.org/debian bookworm main\n")
        );
        assert_eq!(as_source("deb https://example.com x\n", false), None);
    }

    #[test]
    fn the_version_is_in_the_archives_name() {
        assert_eq!(
            upstream_version("kubernetes_1.20.2.orig.tar.gz"),
            Some("1.20.2")
        );
        assert_eq!(
            upstream_version("kubernetes_1.32.3+ds.orig.tar.xz"),
            Some("1.32.3")
        );
        assert_eq!(
            upstream_version("kubernetes_1.20.5+really1.20.2.orig.tar.gz"),
            Some("1.20.2")
        );
        assert_eq!(upstream_version("kubernetes_.orig.tar.gz"), None);
        assert_eq!(upstream_version("other_1.orig.tar.gz"), None);
    }
}
