"""Things in composed scenes: their drawings and the nouns for them."""

import re
from dataclasses import dataclass
from functools import cache

# One line for each thing: its noun, other nouns after "/", and the names of its drawings after "<" if they differ from
# the noun. A name of a colour and a noun, such as "red apple", is the noun in that colour.
_OBJECTS = """
monkey
gorilla
orangutan
dog / puppy
poodle
dog face
wolf
fox < fox, fox face
raccoon
cat / kitten
cat face
lion < lion, lion face
tiger
tiger face
leopard
horse
horse face
moose
donkey
unicorn < unicorn, unicorn face
zebra < zebra, zebra face
deer
bison
cow
cow face
ox
water buffalo
pig
pig face
boar
ram
sheep < ewe, sheep
goat
camel < camel, two hump camel
llama
giraffe < giraffe, giraffe face
elephant
mammoth
rhinoceros / rhino < rhinoceros, rhino
hippopotamus / hippo < hippopotamus, hippo
mouse
mouse face
rat
hamster < hamster, hamster face
rabbit / bunny
rabbit face
chipmunk / squirrel
beaver
hedgehog
bat
bear < bear, bear face
polar bear
koala < koala
panda < panda, panda face
sloth
otter
skunk
kangaroo
badger
turkey
chicken / hen
rooster
chick < baby chick, front facing baby chick, hatching chick
bird
penguin
dove
eagle
duck
swan
owl
dodo
flamingo
peacock
parrot
goose
phoenix
frog < frog, frog face
crocodile / alligator
turtle
lizard
snake
dragon
dragon face
sauropod / dinosaur
t-rex < t rex
whale < whale, spouting whale
dolphin
seal
fish
tropical fish
blowfish
shark
octopus
seashell / shell < spiral shell
jellyfish
crab
lobster
shrimp
squid
oyster
snail
butterfly
caterpillar < bug
ant
bee / honeybee < honeybee
beetle
ladybug < lady beetle
cockroach
spider
scorpion
mosquito
worm
bouquet of flowers < bouquet, bouquet of flowers
cherry blossom
rose
hibiscus
sunflower
blossom
tulip
hyacinth
lotus
seedling
potted plant
pine tree / evergreen tree < evergreen tree
tree < deciduous tree
palm tree
cactus
shamrock
four-leaf clover < four leaf clover
maple leaf
mushroom
feather
bunch of grapes < grapes
melon
watermelon
tangerine / orange < tangerine
lemon
lime
banana
pineapple
mango
apple
pear
peach
pair of cherries < cherries
strawberry
kiwi fruit / kiwi < kiwi fruit
tomato
olive
coconut
avocado
eggplant / aubergine
potato
carrot
ear of corn < ear of corn
hot pepper / chili pepper < hot pepper
bell pepper
cucumber
head of broccoli < broccoli
onion
chestnut
pea pod
loaf of bread < bread
croissant
baguette < baguette bread
pretzel
bagel
stack of pancakes < pancakes
waffle
piece of cheese / cheese wedge < cheese wedge
chicken leg / poultry leg < poultry leg
steak < cut of meat
hamburger / burger < hamburger
box of french fries / box of fries < french fries
pizza / slice of pizza
hot dog
sandwich
taco
burrito
egg
fried egg < cooking
salad < green salad
bucket of popcorn / box of popcorn < popcorn
stick of butter < butter
bento box
rice cracker
rice ball
bowl of rice < cooked rice
bowl of noodles / bowl of soup < steaming bowl
plate of spaghetti < spaghetti
sweet potato < roasted sweet potato
fried shrimp
moon cake
dumpling
fortune cookie
takeout box
ice cream cone / soft ice cream < soft ice cream
bowl of ice cream < ice cream
doughnut / donut < doughnut
cookie
birthday cake
cake / piece of cake < shortcake
cupcake
pie
chocolate bar < chocolate bar
candy / piece of candy < candy
lollipop
pudding / custard < custard
honey pot / jar of honey < honey pot
baby bottle
glass of milk
cup of coffee / hot beverage < hot beverage
teapot
cup of tea / teacup < teacup without handle
bottle of champagne < bottle with popping cork
glass of wine < wine glass
cocktail / cocktail glass < cocktail glass
tropical drink
mug of beer / beer mug < beer mug
cup with a straw < cup with straw
bubble tea / cup of bubble tea
juice box < beverage box
spoon
knife / kitchen knife < kitchen knife
jar
amphora / vase
globe < globe showing europe africa, globe showing americas, globe showing asia australia
compass
mountain < mountain, snow capped mountain
volcano
brick
rock
hut
house
house with a garden < house with garden
office building
post office
hospital
bank
hotel
school
factory
castle
church
mosque
synagogue
fountain
tent
circus tent
ferris wheel
locomotive / steam train < locomotive
train
tram
bus
ambulance
fire truck / fire engine < fire engine
police car
taxi / cab
car / automobile < automobile, oncoming automobile
pickup truck
truck / delivery truck < delivery truck
tractor
race car / racing car < racing car
motorcycle / motorbike
scooter / motor scooter < motor scooter
wheelchair < manual wheelchair
bicycle / bike
kick scooter
skateboard
roller skate
oil drum / barrel < oil drum
fuel pump / gas pump < fuel pump
wheel
traffic light < horizontal traffic light, vertical traffic light
stop sign
anchor
life buoy / ring buoy < ring buoy
sailboat
canoe
speedboat
ship < ship, passenger ship
ferry
airplane / plane
small airplane
parachute
helicopter
satellite
rocket
flying saucer / UFO
bellhop bell
suitcase / luggage < luggage
hourglass < hourglass done, hourglass not done
watch / wristwatch < watch
alarm clock
stopwatch
clock < mantelpiece clock
crescent moon
full moon
thermometer
sun
sun with a face < sun with face
planet / ringed planet < ringed planet
star
cloud
tornado
rainbow
umbrella < umbrella, umbrella with rain drops
closed umbrella
beach umbrella < umbrella on ground
snowflake
snowman < snowman, snowman without snow
comet
flame / fire < fire
drop of water / droplet < droplet
lightning bolt < high voltage
jack-o-lantern / halloween pumpkin < jack o lantern
christmas tree
firecracker
balloon
party popper
confetti ball
wind chime
ribbon
gift / present < wrapped gift
ticket
trophy
medal < sports medal
soccer ball / football < soccer ball
baseball
softball
basketball
volleyball
american football
rugby ball < rugby football
tennis racket < tennis
frisbee < flying disc
boxing glove
ice skate
fishing pole
diving mask
pair of skis < skis
sled
target / bullseye < bullseye, direct hit
yo-yo < yo yo
kite
water pistol < water pistol, pistol
billiard ball / pool ball < pool 8 ball
crystal ball
magic wand
video game controller / game controller < video game
joystick
slot machine
die / game die < game die
puzzle piece < puzzle piece
teddy bear
pinata < pinata
disco ball / mirror ball < mirror ball
chess pawn
artist palette / palette < artist palette
picture frame < framed picture
spool of thread < thread
ball of yarn < yarn
pair of glasses < glasses
pair of sunglasses < sunglasses
lab coat
necktie / tie < necktie
t-shirt < t shirt
pair of jeans < jeans
scarf
pair of gloves < gloves
coat
pair of socks < socks
dress
kimono
swimsuit < one piece swimsuit
pair of shorts < shorts
bikini
folding fan < folding hand fan
purse
handbag
backpack
flip-flop < thong sandal
shoe < mans shoe, man s shoe
running shoe / sneaker < running shoe
hiking boot
high-heeled shoe < high heeled shoe
sandal < womans sandal, woman s sandal
boot < womans boot, woman s boot
hair pick
crown
hat < womans hat, woman s hat
top hat
graduation cap
cap / baseball cap < billed cap
military helmet
lipstick / tube of lipstick
ring
gem / diamond < gem stone
megaphone
bell
microphone
pair of headphones < headphone
radio
saxophone
trumpet
accordion
guitar
piano keyboard < musical keyboard
violin
banjo
drum
flute
harp
mobile phone / phone < mobile phone
telephone
pager
fax machine
battery
electric plug
laptop
computer / desktop computer < desktop computer
printer
keyboard
computer mouse
floppy disk
compact disc / cd < optical disk
abacus
movie camera
film projector
clapper board
television / tv < television
camera < camera, camera with flash
video camera
magnifying glass < magnifying glass tilted left, magnifying glass tilted right
candle
light bulb
flashlight
lantern < red paper lantern
notebook < notebook, notebook with decorative cover
book / closed book < closed book
open book
stack of books < books
scroll
newspaper
coin
money bag
credit card
envelope
package / box < package
mailbox < closed mailbox with raised flag, closed mailbox with lowered flag
postbox
pencil
fountain pen
pen
paintbrush
crayon
briefcase
folder / file folder < file folder
calendar
clipboard
pushpin
paperclip
ruler < straight ruler
triangular ruler
pair of scissors < scissors
file cabinet
trash can / wastebasket < wastebasket
padlock / lock < locked
key
hammer
axe
pickaxe < pick
dagger
bomb
boomerang
bow and arrow
shield
saw < carpentry saw
wrench
screwdriver
gear
clamp
hook
toolbox
magnet
ladder
test tube
microscope
telescope
satellite dish < satellite antenna
syringe
pill
bandage < adhesive bandage
crutch
stethoscope
door
mirror
window
bed
sofa / couch < couch and lamp
chair
toilet
plunger
shower
bathtub
mouse trap
razor
lotion bottle
safety pin
broom
basket
roll of paper / roll of toilet paper < roll of paper
bucket
bar of soap < soap
toothbrush
sponge
fire extinguisher
shopping cart
cigarette
coffin
headstone / gravestone < headstone
moai
skull
ghost
alien
robot < robot, robot face
clown < clown face
heart
broken heart
pile of poo
smiling face / smiley < smiling face, slightly smiling face, grinning face
brain
anatomical heart
tooth
bone
eye
ear
nose
foot
hand < hand with fingers splayed, raised hand
fairy
mermaid
zombie
acorn
garlic bulb < garlic
peanut < peanuts
"""

COLOUR_WORDS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "gray", "white")

# Their drawings include surroundings or contents, such as water, with another colour.
UNCOLOURED = frozenset(
    {
        "speedboat",
        "canoe",
        "sailboat",
        "ship",
        "ferry",
        "beach umbrella",
        "fountain",
        "tent",
        "whale",
        "picture frame",
        "globe",
        "house with a garden",
        "potted plant",
        "rainbow",
        "traffic light",
        "bowl of rice",
        "bowl of noodles",
        "plate of spaghetti",
        "bento box",
        "glass of milk",
        "cup of coffee",
        "sun with a face",
        "artist palette",
        "volcano",
        "mountain",
        "slot machine",
        "ferris wheel",
        "fishing pole",
    }
)

_IRREGULAR = {
    "wolf": "wolves",
    "leaf": "leaves",
    "knife": "knives",
    "scarf": "scarves",
    "loaf": "loaves",
    "mouse": "mice",
    "goose": "geese",
    "ox": "oxen",
    "foot": "feet",
    "tooth": "teeth",
    "die": "dice",
    "cactus": "cacti",
    "snowman": "snowmen",
    "potato": "potatoes",
    "tomato": "tomatoes",
    "mango": "mangoes",
    "volcano": "volcanoes",
    "mosquito": "mosquitoes",
    "buffalo": "buffaloes",
    "bow and arrow": "bows and arrows",
} | {same: same for same in ("sheep", "deer", "fish", "bison", "moose", "squid", "shrimp", "blowfish", "jellyfish")}
# A silent h, and vowels that are pronounced as consonants.
_SILENT_H = ("hourglass",)
_SPOKEN_CONSONANT = ("uni", "ufo", "euro")


@dataclass(frozen=True)
class SceneObject:
    """A kind of thing.

    Attributes:
        nouns: Singular nouns; the first is its name here.
        drawings: Names of its drawings.
    """

    nouns: tuple[str, ...]
    drawings: tuple[str, ...]

    @property
    def noun(self) -> str:
        """Its first noun."""
        return self.nouns[0]


@cache
def scene_objects() -> tuple[SceneObject, ...]:
    """All kinds of things, each noun once."""
    objects = {}
    for line in _OBJECTS.strip().splitlines():
        nouns, _, drawings = line.partition("<")
        words = tuple(noun.strip() for noun in nouns.split("/"))
        names = tuple(name.strip() for name in drawings.split(",") if name.strip())
        objects[words[0]] = SceneObject(words, names or words[:1])
    return tuple(objects.values())


@cache
def object_of_drawing(name: str) -> tuple[str, str | None] | None:
    """Name of a drawing => (noun, colour in the name); None if it is not a thing of scenes.

    "fox face" => ("fox", None); "green apple" => ("apple", "green").
    """
    nouns = _noun_of_drawing()
    if name in nouns:
        return nouns[name], None
    colour, _, rest = name.partition(" ")
    # In "glass of red wine" only the wine is red.
    is_coloured = colour in COLOUR_WORDS and rest in nouns and rest != "wine glass"
    return (nouns[rest], colour) if is_coloured else None


@cache
def _noun_of_drawing() -> dict[str, str]:
    return {drawing: thing.noun for thing in scene_objects() for drawing in thing.drawings} | {"book": "book"}


@cache
def plural_of(noun: str) -> str:
    """ "ear of corn" => "ears of corn"; "fox" => "foxes"."""
    if noun in _IRREGULAR:
        return _IRREGULAR[noun]
    match = re.match(r"(.+?)( (?:of|with|and) .+)", noun)
    head, tail = match.groups() if match else (noun, "")
    start, _, word = head.rpartition(" ")
    if word in _IRREGULAR:
        many = _IRREGULAR[word]
    elif re.search(r"(s|x|z|ch|sh)$", word):
        many = f"{word}es"
    elif re.search(r"[^aeiou]y$", word):
        many = f"{word[:-1]}ies"
    else:
        many = f"{word}s"
    return f"{start} {many}{tail}".strip()


def with_article(words: str) -> str:
    """ "apple" => "an apple"."""
    first = words.lower()
    is_vowel = first[0] in "aeiou" and not first.startswith(_SPOKEN_CONSONANT)
    return f"{'an' if is_vowel or first.startswith(_SILENT_H) else 'a'} {words}"
