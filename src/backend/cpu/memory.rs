//! How much memory there is for this process: what the machine has, or what a container leaves of it.

use std::fs;
use std::path::Path;

/// Bytes of memory this process may use at most, or 0 if that cannot be told.
pub fn usable_memory() -> u64 {
    // SAFETY: sysconf reads a number and touches no memory of ours.
    let (pages, size) = unsafe { (libc::sysconf(libc::_SC_PHYS_PAGES), libc::sysconf(libc::_SC_PAGESIZE)) };
    let machine = u64::try_from(pages).unwrap_or(0) * u64::try_from(size).unwrap_or(0);
    let groups = fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
    match (machine, cgroup_limit(Path::new("/sys/fs/cgroup"), &groups)) {
        (0, limit) => limit.unwrap_or(0),
        (machine, limit) => machine.min(limit.unwrap_or(machine)),
    }
}

/// The lowest memory limit of the control groups, of both versions, that `groups` (as `/proc/self/cgroup` has
/// it) names, and of those around them. Inside of a container the names may be the host's: then the group that
/// is mounted at `root` is its own.
fn cgroup_limit(root: &Path, groups: &str) -> Option<u64> {
    let limits = groups.lines().flat_map(|line| {
        let mut fields = line.splitn(3, ':').skip(1);
        let (controllers, group) = (fields.next().unwrap_or(""), fields.next().unwrap_or(""));
        let (root, file) = match controllers {
            "" => (root.to_path_buf(), "memory.max"),
            _ if controllers.split(',').any(|c| c == "memory") => {
                (root.join("memory"), "memory.limit_in_bytes")
            }
            _ => return Vec::new(),
        };
        let own = root.join(group.trim_start_matches('/'));
        let groups = own.ancestors().take_while(|group| group.starts_with(&root));
        groups.filter_map(|group| fs::read_to_string(group.join(file)).ok()?.trim().parse().ok()).collect()
    });
    limits.min()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limits_of_control_groups() {
        let root = tempfile::tempdir().unwrap();
        let write = |file: &str, text: &str| {
            let path = root.path().join(file);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        };
        write("memory.max", "max\n");
        write("a/memory.max", "8000\n");
        write("a/b/memory.max", "9000\n");
        write("memory/memory.limit_in_bytes", "9223372036854771712\n");
        write("memory/docker/x/memory.limit_in_bytes", "7000\n");
        for (groups, limit) in [
            ("0::/\n", None),
            ("0::/a\n", Some(8000)),
            ("0::/a/b\n", Some(8000)),
            ("0::/not/here\n", None),
            ("3:cpu,cpuacct:/docker/x\n7:memory:/docker/x\n0::/\n", Some(7000)),
            ("7:memory:/elsewhere\n", Some(9223372036854771712)),
            ("7:memory:/docker/x\n0::/a\n", Some(7000)),
            ("nonsense", None),
            ("", None),
        ] {
            assert_eq!(cgroup_limit(root.path(), groups), limit, "{groups}");
        }
    }
}
