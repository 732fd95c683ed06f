//! Debian's kernels, downloaded with apt into a folder of our own: this machine's package lists are not touched.

use std::env;
use std::ffi::OsStr;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail, ensure};
use xtask_support::apt;
use xtask_support::step::{output, run};

/// A kernel to test on.
#[derive(Debug)]
pub(super) struct Kernel {
    /// Its name here.
    pub(super) name: &'static str,
    /// The Debian release whose kernel it is.
    suite: &'static str,
    /// Whether the daemon runs on it. On any other kernel the daemon must report what is missing.
    pub(super) supported: bool,
}

/// The kernels of all Debian releases that are still in use.
pub(super) const KERNELS: [Kernel; 4] = [
    Kernel {
        name: "5.10",
        suite: "bullseye",
        supported: false,
    },
    Kernel {
        name: "6.1",
        suite: "bookworm",
        supported: true,
    },
    Kernel {
        name: "6.12",
        suite: "trixie",
        supported: true,
    },
    Kernel {
        name: "unstable",
        suite: "sid",
        supported: true,
    },
];

/// The kernel of this name.
pub(super) fn named(name: &str) -> Result<&'static Kernel, String> {
    KERNELS
        .iter()
        .find(|kernel| kernel.name == name)
        .ok_or_else(|| {
            let names = KERNELS.map(|kernel| kernel.name).join(", ");
            format!("is none of {names}")
        })
}

/// A kernel that is ready to boot.
#[derive(Debug)]
pub(super) struct Unpacked {
    /// The output of `uname -r`.
    pub(super) release: String,
    /// The kernel's image.
    pub(super) image: PathBuf,
    /// Its modules: `…/lib/modules/RELEASE`.
    pub(super) modules: PathBuf,
}

/// Verifies that virtual machines can be created here.
///
/// # Errors
/// If something prevents it: the error says what.
pub(super) fn supported_here() -> Result<()> {
    ensure!(
        env::consts::ARCH == "x86_64",
        "the machines are of x86_64, and run programs of this one, which is {}",
        env::consts::ARCH
    );
    ensure!(
        apt::present(),
        "the kernels are Debian's packages, and apt-get is missing"
    );
    Ok(())
}

/// Downloads and unpacks a kernel, unless it was before: removing `folder` gets a newer one.
///
/// # Errors
/// If the archive cannot be reached, or does not contain what is expected.
pub(super) fn fetch(kernel: &Kernel, folder: &Path) -> Result<Unpacked> {
    let folder = folder.join(kernel.suite);
    let root = folder.join("root");
    if let Ok(unpacked) = find(&root) {
        return Ok(unpacked);
    }
    let keys = Path::new("/usr/share/keyrings/debian-archive-keyring.gpg");
    if !keys.is_file() {
        apt::install(&["debian-archive-keyring".to_owned()])?;
    }
    let archive = Archive::new(kernel.suite, keys, &folder)?;
    run(archive.command("apt-get").args(["--quiet", "update"]))?;
    let packages = archive.packages()?;
    let debs = folder.join("debs");
    recreate(&debs)?;
    let mut download = archive.command("apt-get");
    download
        .args(["--quiet", "download"])
        .args(&packages)
        .current_dir(&debs);
    run(&mut download)?;
    // Use another name until the extraction is complete.
    let unfinished = folder.join("unfinished");
    recreate(&unfinished)?;
    for deb in files(&debs)? {
        run(Command::new("dpkg-deb")
            .arg("--extract")
            .args([&deb, &unfinished]))?;
    }
    let unpacked = find(&unfinished)?;
    run(Command::new("depmod").arg("-b").args([
        unpacked
            .modules
            .ancestors()
            .nth(3)
            .unwrap_or(&unfinished)
            .as_os_str(),
        OsStr::new(&unpacked.release),
    ]))?;
    let _ = fs::remove_dir_all(&root);
    fs::rename(&unfinished, &root).with_context(|| format!("making {}", root.display()))?;
    let _ = fs::remove_dir_all(&debs);
    find(&root)
}

/// apt with the packages of one release, and none of this machine's.
struct Archive {
    options: Vec<String>,
}

impl Archive {
    fn new(suite: &str, keys: &Path, folder: &Path) -> Result<Self> {
        let (state, cache) = (folder.join("state"), folder.join("cache"));
        for folder in [state.join("lists/partial"), cache.join("archives/partial")] {
            fs::create_dir_all(&folder).with_context(|| format!("making {}", folder.display()))?;
        }
        let (status, sources) = (state.join("status"), folder.join("sources.list"));
        fs::write(&status, "").with_context(|| format!("writing {}", status.display()))?;
        let line = format!(
            "deb [arch=amd64 signed-by={}] http://deb.debian.org/debian {suite} main\n",
            keys.display()
        );
        fs::write(&sources, line).with_context(|| format!("writing {}", sources.display()))?;
        let options = [
            format!("Dir::Etc::SourceList={}", sources.display()),
            "Dir::Etc::SourceParts=/dev/null".to_owned(),
            format!("Dir::State={}", state.display()),
            format!("Dir::State::status={}", status.display()),
            format!("Dir::Cache={}", cache.display()),
            "APT::Architecture=amd64".to_owned(),
            // The folder is one of root's.
            "APT::Sandbox::User=root".to_owned(),
            "Acquire::Languages=none".to_owned(),
        ];
        Ok(Self {
            options: options.into_iter().collect(),
        })
    }

    fn command(&self, program: &str) -> Command {
        let mut command = Command::new(program);
        command.env("LC_ALL", "C");
        for option in &self.options {
            command.args(["-o", option]);
        }
        command
    }

    /// The packages that the release's kernel consists of: one, or since 2026 an image and its modules.
    fn packages(&self) -> Result<Vec<String>> {
        let mut depends = self.command("apt-cache");
        depends.args(["depends", "--recurse", "--important", "linux-image-amd64"]);
        let listed = output(&mut depends).context("apt-cache says nothing of linux-image-amd64")?;
        let packages = kernel_packages(&listed);
        if packages.is_empty() {
            bail!("linux-image-amd64 depends on no kernel: {listed}");
        }
        Ok(packages)
    }
}

/// Of the packages that `apt-cache depends --recurse` lists, those with a kernel's files.
fn kernel_packages(listed: &str) -> Vec<String> {
    let kernel = |name: &&str| {
        ["linux-image-", "linux-binary-", "linux-modules-"]
            .iter()
            .filter_map(|prefix| name.strip_prefix(prefix))
            .any(|rest| rest.starts_with(|letter: char| letter.is_ascii_digit()))
    };
    listed.lines().filter(kernel).map(str::to_owned).collect()
}

/// The kernel in a folder of unpacked packages.
fn find(root: &Path) -> Result<Unpacked> {
    for modules in ["lib/modules", "usr/lib/modules"] {
        let modules = root.join(modules);
        let Some(modules) = files(&modules).unwrap_or_default().into_iter().next() else {
            continue;
        };
        let release = modules
            .file_name()
            .map(|name| name.to_string_lossy().into_owned())
            .unwrap_or_default();
        let images = [
            root.join(format!("boot/vmlinuz-{release}")),
            root.join(format!("usr/boot/vmlinuz-{release}")),
            modules.join("vmlinuz"),
        ];
        if let Some(image) = images.into_iter().find(|image| image.is_file()) {
            return Ok(Unpacked {
                release,
                image,
                modules,
            });
        }
    }
    bail!("{}: holds no kernel with its modules", root.display())
}

/// The entries of a folder, in order.
fn files(folder: &Path) -> Result<Vec<PathBuf>> {
    let reading = || format!("reading {}", folder.display());
    let mut files = fs::read_dir(folder)
        .with_context(reading)?
        .map(|entry| entry.map(|entry| entry.path()))
        .collect::<Result<Vec<_>, _>>()
        .with_context(reading)?;
    files.sort();
    Ok(files)
}

fn recreate(folder: &Path) -> Result<()> {
    let _ = fs::remove_dir_all(folder);
    fs::create_dir_all(folder).with_context(|| format!("making {}", folder.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_kernel_is_one_package_or_several() {
        let one = "linux-image-amd64\n  Depends: linux-image-6.1.0-50-amd64\n\
            linux-image-6.1.0-50-amd64\n  Depends: kmod\nkmod\n";
        assert_eq!(kernel_packages(one), ["linux-image-6.1.0-50-amd64"]);
        let several = "linux-image-amd64\nlinux-base-amd64\nlinux-image-7.2-amd64\n  Depends: x\n\
            linux-base-7.2-amd64\nlinux-binary-7.2-amd64\nlinux-modules-7.2-amd64\n";
        let expected = [
            "linux-image-7.2-amd64",
            "linux-binary-7.2-amd64",
            "linux-modules-7.2-amd64",
        ];
        assert_eq!(kernel_packages(several), expected);
    }

    #[test]
    fn kernels_go_by_their_names() {
        assert_eq!(named("6.12").unwrap().suite, "trixie");
        assert!(named("4.19").unwrap_err().contains("5.10, 6.1"));
    }
}
