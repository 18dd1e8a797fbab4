# Completion of dog and collie for bash; made by packaging/make-docs.
_dog() {
    local words= volumes= path=
    case $COMP_CWORD in
    1) path= ;;
    2) path=${COMP_WORDS[1]} ;;
    *) path="${COMP_WORDS[1]} ${COMP_WORDS[2]}" ;;
    esac
    case $path in
    "") words="vdi node cluster vm benchmark upgrade nbd iscsi store simulate help" ;;
    vdi) words="check create snapshot clone delete rollback list tree graph object track setattr getattr resize read write backup restore alter-copy lock cache export import" ;;
    "vdi check") words="-s --snapshot -e --exist -a --address -p --port -h --help -T --time --json"; volumes=1 ;;
    "vdi create") words="-P --prealloc -y --hyper -c --copies -a --address -p --port -h --help -r --raw -v --verbose -z --block_size_shift -T --time"; volumes=1 ;;
    "vdi snapshot") words="-s --snapshot -a --address -p --port -h --help -r --raw -v --verbose -R --reduce_identical_snapshots -T --time"; volumes=1 ;;
    "vdi clone") words="-s --snapshot -P --prealloc -n --no_share -a --address -p --port -h --help -r --raw -v --verbose -T --time" ;;
    "vdi delete") words="-s --snapshot -a --address -p --port -B --batched_reclamation -I --interval -m --max_reclaim -h --help -T --time"; volumes=1 ;;
    "vdi rollback") words="-s --snapshot -a --address -p --port -f --force -r --raw -v --verbose -B --batched_reclamation -I --interval -h --help -T --time"; volumes=1 ;;
    "vdi list") words="-a --address -p --port -r --raw -o --oid -h --help -T --time --json"; volumes=1 ;;
    "vdi tree") words="-a --address -p --port -h --help -T --time --json" ;;
    "vdi graph") words="-a --address -p --port -h --help -T --time --json" ;;
    "vdi object") words="location map explain dump-inode -i --index -s --snapshot -a --address -p --port -h --help -T --time --json" ;;
    "vdi track") words="-i --index -s --snapshot -o --oid -a --address -p --port -h --help -T --time --json"; volumes=1 ;;
    "vdi setattr") words="-d --delete -x --exclusive -a --address -p --port -h --help -T --time"; volumes=1 ;;
    "vdi getattr") words="-a --address -p --port -h --help -T --time --json"; volumes=1 ;;
    "vdi resize") words="-a --address -p --port -h --help -T --time"; volumes=1 ;;
    "vdi read") words="-s --snapshot -a --address -p --port -h --help -T --time"; volumes=1 ;;
    "vdi write") words="-w --writeback -a --address -p --port -h --help -T --time"; volumes=1 ;;
    "vdi backup") words="-s --snapshot -F --from -a --address -p --port -h --help -T --time"; volumes=1 ;;
    "vdi restore") words="-s --snapshot -a --address -p --port -B --batched_reclamation -I --interval -h --help -T --time"; volumes=1 ;;
    "vdi alter-copy") words="-c --copies -f --force -a --address -p --port -h --help -T --time"; volumes=1 ;;
    "vdi lock") words="list unlock -s --snapshot -a --address -p --port -h --help -T --time --json"; volumes=1 ;;
    "vdi cache") words="flush delete info purge -s --snapshot -a --address -p --port -h --help -T --time --json"; volumes=1 ;;
    "vdi export") words="-s --snapshot -O --format -a --address -p --port -h --help -T --time"; volumes=1 ;;
    "vdi import") words="-c --copies -z --block_size_shift -O --format -a --address -p --port -h --help -T --time"; volumes=1 ;;
    node) words="list info stat kill may-stop recovery md scrub log vnodes format" ;;
    "node list") words="-a --address -p --port -r --raw -v --verbose -h --help -T --time --json" ;;
    "node info") words="-a --address -p --port -r --raw -h --help -T --time --json" ;;
    "node stat") words="-a --address -p --port -r --raw -w --watch -h --help -T --time --json" ;;
    "node kill") words="-a --address -p --port -r --raw -l --local -h --help -T --time" ;;
    "node may-stop") words="-a --address -p --port -h --help -T --time --json" ;;
    "node recovery") words="info set-throttle get-throttle -a --address -p --port -P --progress -r --raw -h --help -T --time --json" ;;
    "node md") words="info plug unplug -a --address -p --port -r --raw -A --all -f --force -h --help -T --time --json" ;;
    "node scrub") words="status start stop schedule -a --address -p --port -r --raw -A --all -h --help -T --time --json" ;;
    "node log") words="level -a --address -p --port -h --help -T --time --json" ;;
    "node vnodes") words="set -a --address -p --port -h --help" ;;
    "node format") words="-a --address -p --port -h --help -T --time" ;;
    cluster) words="info format health shutdown recover reweight check alter-copy snapshot" ;;
    "cluster info") words="-a --address -p --port -r --raw -v --verbose -d --diff -h --help -T --time --json" ;;
    "cluster format") words="-b --store -c --copies -l --lock -t --strict -z --block_size_shift -V --fixed_vnodes -R --recycle_vid -f --force -F --avoid_diskfull --recovery-delay -a --address -p --port -h --help -T --time" ;;
    "cluster health") words="-a --address -p --port -h --help -T --time --json" ;;
    "cluster shutdown") words="-a --address -p --port -h --help -T --time" ;;
    "cluster recover") words="force enable disable -f --force -a --address -p --port -h --help -T --time" ;;
    "cluster reweight") words="-a --address -p --port -h --help -T --time" ;;
    "cluster check") words="-a --address -p --port -h --help -T --time" ;;
    "cluster alter-copy") words="-c --copies -f --force -a --address -p --port -h --help -T --time" ;;
    "cluster snapshot") words="save list show load delete -m --multithread -f --force -a --address -p --port -h --help -T --time --json" ;;
    vm) words="list" ;;
    "vm list") words="-a --address -p --port -r --raw -h --help -T --time --json" ;;
    benchmark) words="io run" ;;
    "benchmark io") words="-f --force -w --workqueue -n --nr_threads -t --total -a --address -p --port -h --help -T --time"; volumes=1 ;;
    "benchmark run") words="-c --copies -S --size -d --seconds -n --rounds -a --address -p --port -r --raw -h --help -T --time --json" ;;
    upgrade) words="inode-convert epoch-convert config-convert object-location" ;;
    "upgrade inode-convert") words="-o --orig -h --help -T --time" ;;
    "upgrade epoch-convert") words="-o --orig -h --help -T --time" ;;
    "upgrade config-convert") words="-h --help -T --time" ;;
    "upgrade object-location") words="-o --orig -h --help -T --time" ;;
    nbd) words="serve uri" ;;
    "nbd serve") words="--socket --listen --tls-certificates --tls-psk --tls-verify-peer --readonly --exclusive --mode --group --threads --swap -a --address -p --port -h --help" ;;
    "nbd uri") words="--socket --listen --tls-certificates --tls-psk --tls-verify-peer -a --address -p --port -r --raw -h --help -T --time --json" ;;
    iscsi) words="export list unexport apply clear tgt-config" ;;
    "iscsi export") words="--initiator --portal --iqn --chap --secret-file --mutual --mutual-secret-file --discovery --discovery-secret-file --readonly --host -a --address -p --port -h --help -T --time"; volumes=1 ;;
    "iscsi list") words="--host -a --address -p --port -r --raw -h --help -T --time --json" ;;
    "iscsi unexport") words="-f --force --host -a --address -p --port -h --help -T --time"; volumes=1 ;;
    "iscsi apply") words="--host -a --address -p --port -h --help -T --time" ;;
    "iscsi clear") words="--host -a --address -p --port -h --help -T --time" ;;
    "iscsi tgt-config") words="--initiator --iqn --tid --host -a --address -p --port -h --help -T --time --json"; volumes=1 ;;
    store) words="check salvage" ;;
    "store check") words="-j --journal -h --help -T --time --json" ;;
    "store salvage") words="-V --vdi -s --snapshot -j --journal -r --raw -h --help -T --time --json" ;;
    simulate) words="simulate" ;;
    "simulate simulate") words="--from-cluster --topology --nodes --zones --used -c --copies --fail --rate --seeds -a --address -p --port -h --help -T --time --json" ;;
    esac
    case ${COMP_WORDS[COMP_CWORD]} in
    -*) volumes= ;;
    esac
    if [ -n "$volumes" ]; then
        words="$words $(dog vdi list -r 2>/dev/null | cut -d' ' -f2 | sort -u)"
    fi
    COMPREPLY=($(compgen -W "$words" -- "${COMP_WORDS[COMP_CWORD]}"))
}
complete -o default -F _dog dog collie
