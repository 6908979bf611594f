//! The list of storages in a container's bundle: what is taken has its mount points where the agent wants
//! them, options that say one thing, and sources that mean what they say.

use kuasar_common::{
    host_socket::Access,
    storage::{MAX_STORAGES, MOUNT_POINTS, parse},
};
use vmm_task::{devices::Matcher, storage::options::Options};

const ALL: &str = r#"[{"driver":"blk","source":"pci:0000:00:05.0","fstype":"ext4","options":["ro","noexec,nodev","rslave"],
"mount_point":"/run/kuasar/storage/c/a"},{"driver":"scsi","source":"scsi:*:0:1:2","fstype":"xfs","mount_point":
"/run/kuasar/storage/c/b","pod":true},{"driver":"pmem","source":"pmem:0000:00:06.0","fstype":"erofs","options":["dax"],
"mount_point":"/run/kuasar/storage/c/c"},{"driver":"share","source":"vol/sub","options":["rro","rshared"],"mount_point":
"/run/kuasar/storage/c/d"},{"driver":"ephemeral","fstype":"hugetlbfs","options":["size=64Mi","pagesize=2M"],"mount_point":
"/run/kuasar/storage/c/e"},{"driver":"overlay","options":["lowerdir=/a:/b","upperdir=/c","workdir=/d"],"mount_point":
"/run/kuasar/storage/c/f"},{"driver":"socket","options":["uid=0","gid=998","mode=660"],"mount_point":
"/run/kuasar/storage/c/g"}]"#;
const ONE: &str = r#"[{"driver":"blk","source":"serial:data","fstype":"ext4","mount_point":"/run/kuasar/storage/x"}]"#;

pub(crate) fn seeds() -> Vec<Vec<u8>> {
    [ALL, ONE, "[]"].map(|text| text.as_bytes().to_vec()).to_vec()
}

pub(crate) fn run(input: &[u8]) {
    let Ok(list) = parse(input) else { return };
    assert!(list.len() <= MAX_STORAGES);
    for storage in list {
        let place = std::path::Path::new(&storage.mount_point);
        assert!(place.starts_with(MOUNT_POINTS) && place.components().all(|part| part.as_os_str() != ".."));
        let options = Options::parse(&storage.options);
        // Times of access are a field of several bits, which is cleared as a whole.
        let both = (options.attributes & options.cleared).bits() & !0x70;
        assert_eq!(both, 0, "{options:?}");
        if let Ok(access) = Access::parse(&storage.options) {
            assert!(access.mode <= 0o7777);
            assert_eq!(Access::parse(&access.storage(&storage.mount_point).options), Ok(access));
        }
        if let Ok(matcher) = storage.source.parse::<Matcher>() {
            assert_eq!(matcher.to_string().parse::<Matcher>().as_ref(), Ok(&matcher));
        }
    }
}
