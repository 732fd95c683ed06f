//! The file of a Unix socket that pods mount: put in place at once, and recognised as the daemon's own.

use std::{
    ffi::OsString,
    fs::{self, DirBuilder, Metadata, Permissions},
    io,
    os::unix::{
        fs::{DirBuilderExt, FileTypeExt, MetadataExt, PermissionsExt},
        net::UnixListener,
    },
    path::{Path, PathBuf},
};

use auth_datapath::listen_at;
use nix::unistd::geteuid;

/// Everybody may pass through the folder, and only its owner may change it.
const FOLDER_MODE: u32 = 0o755;
/// Everybody may connect: whoever does is attested.
const SOCKET_MODE: u32 = 0o666;
/// Write permission of the group and of others.
const WRITABLE: u32 = 0o022;
/// In a folder with this bit, only the owner of a file may rename it.
const STICKY: u32 = 0o1000;

/// A socket's file, which the daemon has made.
#[derive(Debug)]
pub(super) struct SocketFile {
    path: PathBuf,
    device: u64,
    inode: u64,
}

impl SocketFile {
    /// Listens at `path`. What an earlier daemon left there is replaced at once, so that clients find the old socket or the new
    /// one. Creates the folder if it is missing. Fails if others than the daemon's user may write to the folder, or rename it or
    /// one above it, because they could put a socket of their own there.
    pub(super) fn listen(path: &Path) -> io::Result<(UnixListener, Self)> {
        prepare_folder(path.parent().unwrap_or(Path::new("/")))?;
        refuse_other_file(path)?;
        let new = unfinished(path);
        remove_socket(&new)?;
        let (listener, refuses_rights) = listen_at(&new)?;
        if !refuses_rights {
            tracing::warn!(
                path = %path.display(),
                "before Linux 6.16, a pod that passes descriptors to the workload API's socket can stop the API on this node"
            );
        }
        fs::set_permissions(&new, Permissions::from_mode(SOCKET_MODE))?;
        let made = fs::symlink_metadata(&new)?;
        fs::rename(&new, path)?;
        let file = Self {
            path: path.to_owned(),
            device: made.dev(),
            inode: made.ino(),
        };
        Ok((listener, file))
    }

    /// Whether it is still at its path.
    pub(super) fn is_in_place(&self) -> bool {
        fs::symlink_metadata(&self.path)
            .is_ok_and(|found| found.dev() == self.device && found.ino() == self.inode)
    }
}

/// Removes the socket at `path`, of a daemon that has ended. The folder stays, because pods that mount it would not see a new
/// one. Returns whether there was a socket.
pub(super) fn remove(path: &Path) -> io::Result<bool> {
    remove_socket(&unfinished(path))?;
    remove_socket(path)
}

/// The path of a socket until it can be used.
fn unfinished(path: &Path) -> PathBuf {
    let mut name = OsString::from(path);
    name.push(".new");
    name.into()
}

fn prepare_folder(folder: &Path) -> io::Result<()> {
    if !folder.exists() {
        DirBuilder::new()
            .recursive(true)
            .mode(FOLDER_MODE)
            .create(folder)?;
        // The umask may have taken away some of it.
        fs::set_permissions(folder, Permissions::from_mode(FOLDER_MODE))?;
    }
    let found = fs::symlink_metadata(folder)?;
    let user = geteuid().as_raw();
    if !is_private(&found, user) {
        return Err(io::Error::other(format!(
            "{} must be a folder of the daemon's user that nobody else may write to, and is {}",
            folder.display(),
            described(&found)
        )));
    }
    // Whoever may rename one of the folders above can put another one in place of this one.
    let real = folder.canonicalize()?;
    for above in [folder, real.as_path()]
        .into_iter()
        .flat_map(|path| path.ancestors().skip(1))
    {
        if above.as_os_str().is_empty() {
            continue;
        }
        let found = fs::metadata(above)?;
        if !keeps_names(&found, user) {
            return Err(io::Error::other(format!(
                "{}, which {} is in, must be a folder of root or the daemon's user in which nobody else may rename files, and \
                 is {}",
                above.display(),
                folder.display(),
                described(&found)
            )));
        }
    }
    Ok(())
}

fn described(found: &Metadata) -> String {
    format!(
        "user {}'s with mode {:o}",
        found.uid(),
        found.mode() & 0o7777
    )
}

fn is_private(folder: &Metadata, user: u32) -> bool {
    folder.is_dir() && folder.uid() == user && folder.mode() & WRITABLE == 0
}

/// Whether nobody but root and `user` can rename what is theirs in the folder.
fn keeps_names(folder: &Metadata, user: u32) -> bool {
    let is_own = folder.uid() == user || folder.uid() == 0;
    is_own && (folder.mode() & WRITABLE == 0 || folder.mode() & STICKY != 0)
}

fn refuse_other_file(path: &Path) -> io::Result<()> {
    match fs::symlink_metadata(path) {
        Ok(found) if !found.file_type().is_socket() => Err(io::Error::new(
            io::ErrorKind::AlreadyExists,
            format!("{} is no socket; remove it", path.display()),
        )),
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

/// Removes a socket, and fails if there is another kind of file. Returns whether there was one.
fn remove_socket(path: &Path) -> io::Result<bool> {
    refuse_other_file(path)?;
    match fs::remove_file(path) {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixStream;

    use super::*;

    #[test]
    fn replaces_the_socket_of_an_earlier_daemon_at_once() {
        let root = tempfile::tempdir().unwrap();
        let path = root.path().join("a/b/api.sock");
        let (first, old) = SocketFile::listen(&path).unwrap();
        assert!(old.is_in_place());
        let (second, new) = SocketFile::listen(&path).unwrap();
        assert!(new.is_in_place() && !old.is_in_place());
        drop(first);
        UnixStream::connect(&path).unwrap();
        assert!(second.accept().is_ok());
        let modes = [&path, path.parent().unwrap()].map(|path| {
            let found = fs::symlink_metadata(path).unwrap();
            found.mode() & 0o777
        });
        assert_eq!(modes, [SOCKET_MODE, FOLDER_MODE]);
        let files = fs::read_dir(path.parent().unwrap()).unwrap();
        assert_eq!(files.count(), 1, "nothing but the socket");
        assert!(remove(&path).unwrap() && !new.is_in_place());
        assert!(!remove(&path).unwrap());
    }

    #[test]
    fn refuses_a_folder_that_others_may_write_to() {
        let root = tempfile::tempdir().unwrap();
        let path = root.path().join("api.sock");
        for mode in [0o777, 0o775, 0o1757] {
            fs::set_permissions(root.path(), Permissions::from_mode(mode)).unwrap();
            let refused = SocketFile::listen(&path).unwrap_err();
            assert!(refused.to_string().contains("nobody else"), "{refused}");
        }
        assert!(!path.exists());
        let own = fs::symlink_metadata(root.path()).unwrap();
        assert!(!is_private(&own, own.uid() + 1));
    }

    #[test]
    fn refuses_a_folder_that_others_may_replace() {
        let root = tempfile::tempdir().unwrap();
        let (above, elsewhere) = (root.path().join("above"), root.path().join("elsewhere"));
        fs::create_dir_all(above.join("folder")).unwrap();
        fs::create_dir(&elsewhere).unwrap();
        let link = elsewhere.join("link");
        std::os::unix::fs::symlink(&above, &link).unwrap();
        let paths = [&above, &link].map(|folder| folder.join("folder/api.sock"));
        let listen = |mode, at: &Path| {
            fs::set_permissions(at, Permissions::from_mode(mode)).unwrap();
            let heard = paths.each_ref().map(|path| SocketFile::listen(path).err());
            fs::set_permissions(at, Permissions::from_mode(0o755)).unwrap();
            heard.map(|error| error.map(|error| error.to_string()))
        };
        for mode in [0o777, 0o775] {
            let expected = ["above, which", "link, which"];
            for (refused, expected) in listen(mode, &above).into_iter().zip(expected) {
                let refused = refused.unwrap();
                assert!(refused.contains(expected), "{refused}");
            }
            // Only by the symbolic link.
            let [direct, linked] = listen(mode, &elsewhere);
            assert_eq!(direct, None);
            let linked = linked.unwrap();
            assert!(linked.contains("elsewhere, which"), "{linked}");
        }
        assert_eq!(listen(0o1777, &above), [None, None]);
        let own = fs::metadata(&above).unwrap();
        assert!(own.uid() == 0 || !keeps_names(&own, own.uid() + 1));
    }

    #[test]
    fn leaves_other_files_alone() {
        let root = tempfile::tempdir().unwrap();
        let path = root.path().join("sub/api.sock");
        fs::create_dir(root.path().join("sub")).unwrap();
        fs::write(&path, "notes").unwrap();
        assert!(SocketFile::listen(&path).is_err() && remove(&path).is_err());
        assert_eq!(fs::read_to_string(&path).unwrap(), "notes");
        fs::remove_file(&path).unwrap();
        std::os::unix::fs::symlink("/etc/hosts", &path).unwrap();
        assert!(SocketFile::listen(&path).is_err());
    }
}
